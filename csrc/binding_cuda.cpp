// torch.ops.realflow.{move, checksums, gae} on CUDA. Built where torch has CUDA (setup.py).
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <tuple>

#include "gae_checks.h"
#include "gae_cuda.h"
#include "move_cuda.h"
#include "table.h"

namespace realflow {
namespace {

// `words` int64 on the host, filled by `fill`, as a tensor on the device: one copy from pinned memory,
// which torch's allocator keeps until the stream has read it.
template <typename Fill>
at::Tensor uploaded(std::int64_t words, const at::Device& device, Fill fill) {
  at::Tensor host = at::empty({words}, at::TensorOptions(at::kLong).pinned_memory(true));
  fill(host.mutable_data_ptr<std::int64_t>());
  return host.to(device, /*non_blocking=*/true);
}

void move_cuda(at::TensorList sources, const at::Tensor& table, at::TensorList destinations, double decay) {
  if (table.numel() == 0) return;
  TORCH_CHECK(!destinations.empty(), "realflow.move: no destination");
  const at::Device device = destinations[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const Piece* pieces = checked(table, sources, destinations, device);
  std::vector<RealflowTask> tasks;
  for (std::int64_t index = 0; index < table.size(0); ++index) {
    const std::int64_t blocks = blocks_in(pieces[index], realflow_block_limit());
    for (std::int64_t block = 0; block < blocks; ++block) tasks.push_back({index, block});
  }
  TORCH_CHECK(tasks.size() <= std::numeric_limits<std::int32_t>::max(), "realflow.move: too many blocks");
  const auto from = static_cast<std::int64_t>(sources.size());
  const auto to = static_cast<std::int64_t>(destinations.size());
  const auto blocks = static_cast<std::int64_t>(tasks.size());
  const at::Tensor words = uploaded(from + to + table.numel() + 2 * blocks, device, [&](std::int64_t* at) {
    for (const at::Tensor& tensor : sources) {
      *at++ = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(tensor.const_data_ptr()));
    }
    for (const at::Tensor& tensor : destinations) {
      *at++ = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(tensor.mutable_data_ptr()));
    }
    std::memcpy(at, pieces, static_cast<std::size_t>(table.numel()) * sizeof(std::int64_t));
    std::memcpy(at + table.numel(), tasks.data(), tasks.size() * sizeof(RealflowTask));
  });
  auto* at = words.mutable_data_ptr<std::int64_t>();
  C10_CUDA_CHECK(static_cast<cudaError_t>(realflow_move_cuda(
      reinterpret_cast<const Piece*>(at + from + to),
      reinterpret_cast<const RealflowTask*>(at + from + to + table.numel()), blocks,
      reinterpret_cast<const void* const*>(at), reinterpret_cast<void* const*>(at + from), decay,
      c10::cuda::getCurrentCUDAStream(device.index()).stream())));
}

// A tensor of int64 on the host as one on the device.
at::Tensor uploaded(const at::Tensor& words, const at::Device& device) {
  return uploaded(words.numel(), device, [&](std::int64_t* at) {
    std::memcpy(at, words.const_data_ptr<std::int64_t>(), words.nbytes());
  });
}

at::Tensor checksums_cuda(const at::Tensor& buffer, const at::Tensor& bounds) {
  checked_bounds(bounds, buffer);
  const at::Device device = buffer.device();
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor there = uploaded(bounds, device);
  at::Tensor sums = at::zeros({bounds.numel() - 1}, at::TensorOptions(at::kLong).device(device));
  C10_CUDA_CHECK(static_cast<cudaError_t>(realflow_checksums_cuda(
      buffer.const_data_ptr(), there.const_data_ptr<std::int64_t>(), sums.numel(),
      reinterpret_cast<std::uint64_t*>(sums.mutable_data_ptr<std::int64_t>()),
      c10::cuda::getCurrentCUDAStream(device.index()).stream())));
  return sums;
}

std::tuple<at::Tensor, at::Tensor> gae_cuda(const at::Tensor& rewards, const at::Tensor& values,
                                            const at::Tensor& mask, const at::Tensor& bounds,
                                            const at::Tensor& bootstrap, double gamma, double lam) {
  const std::int64_t samples = checked_samples(rewards, values, mask, bounds, bootstrap);
  const at::Device device = values.device();
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor there = uploaded(bounds, device);
  at::Tensor advantages = at::empty_like(values);
  at::Tensor returns = at::empty_like(values);
  const Gae batch = gae_batch(rewards, values, mask, there.const_data_ptr<std::int64_t>(), bootstrap, gamma,
                              lam, advantages, returns);
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      realflow_gae_cuda(&batch, samples, c10::cuda::getCurrentCUDAStream(device.index()).stream())));
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY_IMPL(realflow, CUDA, library) {
  library.impl("move", &move_cuda);
  library.impl("checksums", &checksums_cuda);
  library.impl("gae", &gae_cuda);
}

}  // namespace realflow
