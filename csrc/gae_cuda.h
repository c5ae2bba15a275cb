// The CUDA side of gae.h: one launch, a warp for each sample. C linkage, no torch and no CUDA header. All
// pointers but `stream` (a cudaStream_t) are to device memory.
#pragma once

#include "gae.h"

extern "C" {

// Returns a cudaError_t, 0 where the launch succeeded.
int realflow_gae_cuda(const realflow::Gae* batch, std::int64_t samples, void* stream);
}
