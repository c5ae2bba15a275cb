// What happens to one element on its way: converted, or blended into what is there. The same
// functions serve the CPU and the GPU, and give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define REALFLOW_BOTH __host__ __device__ inline
#else
#define REALFLOW_BOTH inline
#endif

namespace realflow {

// The upper half of a float. Rounds to the nearest, ties to even; NaN becomes 0x7fc0, as in torch.
struct BFloat16 {
  std::uint16_t bits;
};

REALFLOW_BOTH float widen(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

REALFLOW_BOTH BFloat16 narrow(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded)};
}

// The type in which a pair is computed: double where either is, otherwise float.
template <typename From, typename To>
struct Arithmetic {
  using type = float;
};
template <typename To>
struct Arithmetic<double, To> {
  using type = double;
};
template <typename From>
struct Arithmetic<From, double> {
  using type = double;
};
template <>
struct Arithmetic<double, double> {
  using type = double;
};

template <typename Number, typename From>
REALFLOW_BOTH Number read_as(From value) {
  return static_cast<Number>(value);
}
template <>
REALFLOW_BOTH float read_as<float, BFloat16>(BFloat16 value) {
  return widen(value);
}
template <>
REALFLOW_BOTH double read_as<double, BFloat16>(BFloat16 value) {
  return widen(value);
}

template <typename To, typename Number>
REALFLOW_BOTH To write_as(Number value) {
  return static_cast<To>(value);
}
template <>
REALFLOW_BOTH BFloat16 write_as<BFloat16, float>(float value) {
  return narrow(value);
}
template <>
REALFLOW_BOTH BFloat16 write_as<BFloat16, double>(double value) {
  return narrow(static_cast<float>(value));
}

// old * keep + value * take, each step rounded: a fused multiply-add would give a GPU other bits.
REALFLOW_BOTH float weighted(float old, float keep, float value, float take) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(old, keep), __fmul_rn(value, take));
#else
  return old * keep + value * take;  // compiled with -ffp-contract=off
#endif
}
REALFLOW_BOTH double weighted(double old, double keep, double value, double take) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(__dmul_rn(old, keep), __dmul_rn(value, take));
#else
  return old * keep + value * take;
#endif
}

template <typename From, typename To>
REALFLOW_BOTH void convert(const From& from, To& to) {
  using Number = typename Arithmetic<From, To>::type;
  to = write_as<To>(read_as<Number>(from));
}

// An exponential moving average: to = decay * to + (1 - decay) * from.
template <typename From, typename To>
REALFLOW_BOTH void blend(const From& from, To& to, double decay) {
  using Number = typename Arithmetic<From, To>::type;
  to = write_as<To>(weighted(read_as<Number>(to), static_cast<Number>(decay), read_as<Number>(from),
                             static_cast<Number>(1.0 - decay)));
}

// The contribution of one word to a checksum: one to one in the word, and different at every place.
REALFLOW_BOTH std::uint64_t term(std::uint64_t word, std::uint64_t place) {
  std::uint64_t value = (word ^ ((place + 1) * 0x9e3779b97f4a7c15ULL)) * 0xd6e8feb86659fd93ULL;
  value = (value ^ (value >> 32)) * 0xff51afd7ed558ccdULL;
  return value ^ (value >> 29);
}

// The checksum of a range of bytes: the sum of the terms of its words (the last one filled up with
// zeros), and its length. A sum, so that any threads may share the work.
REALFLOW_BOTH std::uint64_t finished(std::uint64_t sum, std::int64_t bytes) {
  return term(sum ^ static_cast<std::uint64_t>(bytes), static_cast<std::uint64_t>(bytes));
}

}  // namespace realflow
