// The work of one GPU warp on one sample, in terms of what its 32 threads tell one another: gae.cu gives
// it a warp, and a test on the CPU 32 threads in lockstep.
#pragma once

#include "gae.h"

namespace realflow {

constexpr int kLanes = 32;

REALFLOW_BOTH int lowest_bit(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

REALFLOW_BOTH int highest_bit(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(static_cast<int>(bits));
#else
  return 31 - __builtin_clz(bits);
#endif
}

// Goes through a sample from its end, 32 tokens at a time: read side by side, their step errors computed
// at once, and then added up one after the other in the CPU's order, so that the bits are the CPU's.
//
// `warp.lane()` is the thread's number, `warp.ballot(bool)` a bit for each thread, `warp.from(double,
// lane)` another thread's number. All threads of a warp call these together.
template <typename Warp>
REALFLOW_BOTH void gae_sample(const Gae& batch, std::int64_t sample, Warp& warp) {
  const std::int64_t first = batch.bounds[sample];
  const int lane = warp.lane();
  double next = batch.bootstrap[sample];  // the value of the state after the 32 tokens
  double sum = 0;
  for (std::int64_t end = batch.bounds[sample + 1]; end > first; end -= kLanes) {
    const std::int64_t at = end - kLanes + lane;
    const bool inside = at >= first;
    const bool mine = inside && batch.mask[at];
    const double value = mine ? batch.values[at] : 0.0;
    const std::uint32_t chosen = warp.ballot(mine);
    const std::uint32_t later = lane == kLanes - 1 ? 0u : chosen >> (lane + 1) << (lane + 1);
    const double following = warp.from(value, later ? lowest_bit(later) : lane);
    const double error =
        mine ? step_error(batch, batch.rewards[at], later ? following : next, value) : 0.0;
    double own = 0;
    for (std::uint32_t rest = chosen; rest != 0;) {
      const int top = highest_bit(rest);
      sum = plus_product(warp.from(error, top), batch.factor, sum);
      if (lane == top) own = sum;
      rest &= ~(1u << top);
    }
    const double earliest = warp.from(value, chosen ? lowest_bit(chosen) : lane);
    if (chosen) next = earliest;
    if (inside) {
      batch.advantages[at] = own;
      batch.returns[at] = mine ? own + value : 0.0;
    }
  }
}

}  // namespace realflow
