#include "gae_cuda.h"

#include <cuda_runtime.h>

#include "gae_warp.h"

namespace realflow {
namespace {

constexpr unsigned kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

struct Warp {
  __device__ int lane() const { return static_cast<int>(threadIdx.x % kLanes); }
  __device__ std::uint32_t ballot(bool said) const { return __ballot_sync(kAll, said); }
  __device__ double from(double value, int lane) const { return __shfl_sync(kAll, value, lane); }
};

// A whole warp has a sample or has none, so that all of its threads stay together.
__global__ void __launch_bounds__(kThreads) gae_kernel(const Gae batch, const std::int64_t samples) {
  const std::int64_t sample = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (sample >= samples) return;
  Warp warp;
  gae_sample(batch, sample, warp);
}

}  // namespace
}  // namespace realflow

extern "C" int realflow_gae_cuda(const realflow::Gae* batch, std::int64_t samples, void* stream) {
  if (samples == 0) return cudaSuccess;
  constexpr std::int64_t warps = realflow::kThreads / realflow::kLanes;
  const auto blocks = static_cast<unsigned>((samples + warps - 1) / warps);
  realflow::gae_kernel<<<blocks, realflow::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*batch, samples);
  return cudaGetLastError();
}
