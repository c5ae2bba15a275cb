#include "gae.h"

namespace realflow {
namespace {

// Fewer tokens than this are done before a second thread has woken up.
constexpr std::int64_t kShared = 16 * 1024;

void sample_backwards(const Gae& batch, std::int64_t sample) {
  double next = batch.bootstrap[sample];
  double sum = 0;
  for (std::int64_t at = batch.bounds[sample + 1]; at-- > batch.bounds[sample];) {
    const double value = batch.values[at];
    if (batch.mask[at]) {
      sum = plus_product(step_error(batch, batch.rewards[at], next, value), batch.factor, sum);
      next = value;
    }
    batch.advantages[at] = batch.mask[at] ? sum : 0.0;
    batch.returns[at] = batch.mask[at] ? sum + value : 0.0;
  }
}

}  // namespace

void gae(const Gae& batch, std::int64_t samples, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (batch.bounds[samples] >= kShared)
  for (std::int64_t sample = 0; sample < samples; ++sample) sample_backwards(batch, sample);
}

}  // namespace realflow
