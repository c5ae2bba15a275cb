// The CUDA side of move.h: one launch for all pieces. C linkage, no torch and no CUDA header, so that
// any binding can call it. All pointers but `stream` (a cudaStream_t) are to device memory.
#pragma once

#include "move.h"

extern "C" {

// A block of work: which piece, and which of its blocks (of realflow_block_limit() elements).
struct RealflowTask {
  std::int64_t piece;
  std::int64_t index;
};

std::int64_t realflow_block_limit(void);

// Returns a cudaError_t, 0 where the launch succeeded. `tasks` has at most 2^31 - 1 entries.
int realflow_move_cuda(const realflow::Piece* pieces, const RealflowTask* tasks, std::int64_t count,
                       const void* const* sources, void* const* destinations, double decay, void* stream);

// `sums` (`count` words) must be zero at the start. Returns a cudaError_t.
int realflow_checksums_cuda(const void* buffer, const std::int64_t* bounds, std::int64_t count,
                            std::uint64_t* sums, void* stream);
}
