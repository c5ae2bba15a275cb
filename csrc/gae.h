// Generalised advantage estimation over packed samples (arXiv 1506.02438).
//
// No torch here: pointers and counts only, so that the same functions serve CPU, GPU and tests.
#pragma once

#include <cstdint>

#include "elements.h"

namespace realflow {

// Samples one after the other: sample s has the tokens [bounds[s], bounds[s + 1]). `mask` says which of
// them the policy chose, `values` holds the value of the state in which each was chosen, and
// `bootstrap` (one entry a sample) that of the state after the last one. What is not chosen is skipped,
// and gets 0. All pointers are to memory of the device that computes.
struct Gae {
  const double* rewards;
  const double* values;
  const bool* mask;
  const std::int64_t* bounds;
  const double* bootstrap;
  double* advantages;
  double* returns;
  double gamma;
  double factor;  // gamma * lambda
};

// a + b * c, each step rounded: a fused multiply-add would give a GPU other bits.
REALFLOW_BOTH double plus_product(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, __dmul_rn(b, c));
#else
  return a + b * c;  // compiled with -ffp-contract=off
#endif
}

// The error of one step: reward + gamma * next - value.
REALFLOW_BOTH double step_error(const Gae& batch, double reward, double next, double value) {
  return plus_product(reward, batch.gamma, next) - value;
}

// Every sample of the batch. The result does not depend on the number of threads.
void gae(const Gae& batch, std::int64_t samples, int threads);

}  // namespace realflow
