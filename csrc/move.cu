#include "move_cuda.h"

#include <cuda_runtime.h>

#include "lanes.h"

namespace realflow {
namespace {

constexpr unsigned kThreads = 256;
constexpr std::int64_t kLimit = 32 * 1024;  // elements of a block: 8 accesses of 16 bytes a thread
constexpr unsigned kStripes = 64;           // blocks that share one range of a checksum

__global__ void __launch_bounds__(kThreads)
    move_kernel(const Piece* __restrict__ pieces, const RealflowTask* __restrict__ tasks,
                const void* const* __restrict__ sources, void* const* __restrict__ destinations,
                double decay) {
  const RealflowTask task = tasks[blockIdx.x];
  const Piece piece = pieces[task.piece];
  move_lane(piece, task.index, kLimit, static_cast<const std::byte*>(sources[piece.source]),
            static_cast<std::byte*>(destinations[piece.destination]), decay, threadIdx.x, kThreads);
}

__global__ void __launch_bounds__(kThreads)
    checksum_kernel(const std::byte* __restrict__ buffer, const std::int64_t* __restrict__ bounds,
                    unsigned long long* __restrict__ sums) {
  const std::byte* data = buffer + bounds[blockIdx.x];
  const std::int64_t bytes = bounds[blockIdx.x + 1] - bounds[blockIdx.x];
  const std::int64_t words = (bytes + 7) / 8;
  std::uint64_t sum = checksum_lane(data, bytes, 0, words, blockIdx.y * kThreads + threadIdx.x,
                                    gridDim.y * kThreads);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(sums + blockIdx.x, sum);
}

__global__ void finish_kernel(const std::int64_t* __restrict__ bounds, std::int64_t count,
                              std::uint64_t* __restrict__ sums) {
  const std::int64_t range = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (range < count) sums[range] = finished(sums[range], bounds[range + 1] - bounds[range]);
}

}  // namespace
}  // namespace realflow

extern "C" std::int64_t realflow_block_limit(void) { return realflow::kLimit; }

extern "C" int realflow_move_cuda(const realflow::Piece* pieces, const RealflowTask* tasks,
                                  std::int64_t count, const void* const* sources, void* const* destinations,
                                  double decay, void* stream) {
  if (count == 0) return cudaSuccess;
  realflow::move_kernel<<<static_cast<unsigned>(count), realflow::kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(pieces, tasks, sources, destinations, decay);
  return cudaGetLastError();
}

extern "C" int realflow_checksums_cuda(const void* buffer, const std::int64_t* bounds, std::int64_t count,
                                       std::uint64_t* sums, void* stream) {
  if (count == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(count), realflow::kStripes);
  realflow::checksum_kernel<<<grid, realflow::kThreads, 0, queue>>>(
      static_cast<const std::byte*>(buffer), bounds, reinterpret_cast<unsigned long long*>(sums));
  const auto blocks = static_cast<unsigned>((count + realflow::kThreads - 1) / realflow::kThreads);
  realflow::finish_kernel<<<blocks, realflow::kThreads, 0, queue>>>(bounds, count, sums);
  return cudaGetLastError();
}
