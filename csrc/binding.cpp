// torch.ops.realflow.{move, checksums, gae} on the CPU: checks every range, then calls move.h and gae.h.
//
// Only torch/library.h and the tensor class are included: torch/extension.h triples the build time.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "gae_checks.h"
#include "table.h"

namespace realflow {
namespace {

void move_cpu(at::TensorList sources, const at::Tensor& table, at::TensorList destinations, double decay) {
  const Piece* pieces = checked(table, sources, destinations, at::kCPU);
  std::vector<const std::byte*> from;
  std::vector<std::byte*> to;
  for (const at::Tensor& tensor : sources) {
    from.push_back(static_cast<const std::byte*>(tensor.const_data_ptr()));
  }
  for (const at::Tensor& tensor : destinations) {
    to.push_back(static_cast<std::byte*>(tensor.mutable_data_ptr()));
  }
  move(pieces, table.size(0), from.data(), to.data(), decay, at::get_num_threads());
}

at::Tensor checksums_cpu(const at::Tensor& buffer, const at::Tensor& bounds) {
  const std::int64_t* at = checked_bounds(bounds, buffer);
  at::Tensor sums = at::empty({bounds.numel() - 1}, at::kLong);
  checksums(static_cast<const std::byte*>(buffer.const_data_ptr()), at, sums.numel(),
            reinterpret_cast<std::uint64_t*>(sums.mutable_data_ptr<std::int64_t>()), at::get_num_threads());
  return sums;
}

std::tuple<at::Tensor, at::Tensor> gae_cpu(const at::Tensor& rewards, const at::Tensor& values,
                                           const at::Tensor& mask, const at::Tensor& bounds,
                                           const at::Tensor& bootstrap, double gamma, double lam) {
  const std::int64_t samples = checked_samples(rewards, values, mask, bounds, bootstrap);
  at::Tensor advantages = at::empty_like(values);
  at::Tensor returns = at::empty_like(values);
  const auto* starts = bounds.const_data_ptr<std::int64_t>();
  gae(gae_batch(rewards, values, mask, starts, bootstrap, gamma, lam, advantages, returns), samples,
      at::get_num_threads());
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY(realflow, library) {
  library.def("move(Tensor[] sources, Tensor table, Tensor(a!)[] destinations, float decay) -> ()");
  library.def("checksums(Tensor buffer, Tensor bounds) -> Tensor");
  library.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, Tensor bounds, Tensor bootstrap, float gamma, "
      "float lam) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(realflow, CPU, library) {
  library.impl("move", &move_cpu);
  library.impl("checksums", &checksums_cpu);
  library.impl("gae", &gae_cpu);
}

}  // namespace realflow
