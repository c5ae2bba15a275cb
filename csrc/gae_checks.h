// What the tensors of a batch must be before a kernel may believe them. For the bindings.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

#include "gae.h"

namespace realflow {

inline void check_numbers(const at::Tensor& tensor, const char* name, std::int64_t entries,
                          const at::Device& device, at::ScalarType type) {
  TORCH_CHECK(tensor.device() == device && tensor.is_contiguous() && tensor.scalar_type() == type &&
                  tensor.dim() == 1 && tensor.numel() == entries,
              "realflow.gae: ", name, " must be a contiguous ", type, " tensor of ", entries, " entries on ",
              device);
}

// The number of samples. `bounds` is on the CPU: where each sample starts and where the last one ends.
inline std::int64_t checked_samples(const at::Tensor& rewards, const at::Tensor& values,
                                    const at::Tensor& mask, const at::Tensor& bounds,
                                    const at::Tensor& bootstrap) {
  const at::Device device = values.device();
  const std::int64_t tokens = values.numel();
  check_numbers(values, "values", tokens, device, at::kDouble);
  check_numbers(rewards, "rewards", tokens, device, at::kDouble);
  check_numbers(mask, "mask", tokens, device, at::kBool);
  TORCH_CHECK(bounds.device().is_cpu() && bounds.is_contiguous() && bounds.scalar_type() == at::kLong &&
                  bounds.dim() == 1 && bounds.numel() > 0,
              "realflow.gae: the bounds must be a contiguous int64 [samples + 1] tensor on the CPU");
  const std::int64_t samples = bounds.numel() - 1;
  TORCH_CHECK(samples <= std::numeric_limits<std::int32_t>::max(), "realflow.gae: too many samples");
  check_numbers(bootstrap, "bootstrap", samples, device, at::kDouble);
  const auto* at = bounds.const_data_ptr<std::int64_t>();
  for (std::int64_t sample = 0; sample < samples; ++sample) {
    TORCH_CHECK(at[sample] <= at[sample + 1], "realflow.gae: the bounds of sample ", sample, " fall");
  }
  TORCH_CHECK(at[0] == 0 && at[samples] == tokens, "realflow.gae: the bounds do not end at the tokens' ends");
  return samples;
}

// The batch in the kernels' words; `bounds` are those on the tensors' device.
inline Gae gae_batch(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask,
                     const std::int64_t* bounds, const at::Tensor& bootstrap, double gamma, double lam,
                     at::Tensor& advantages, at::Tensor& returns) {
  return {rewards.const_data_ptr<double>(),
          values.const_data_ptr<double>(),
          mask.const_data_ptr<bool>(),
          bounds,
          bootstrap.const_data_ptr<double>(),
          advantages.mutable_data_ptr<double>(),
          returns.mutable_data_ptr<double>(),
          gamma,
          gamma * lam};
}

}  // namespace realflow
