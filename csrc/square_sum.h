// Sums of squares on the CPU, the same bits for every CPU and division of the work. Of a block, sixteen interleaved sums
// are kept in fp32 and then added in fp64: 64 fp32 additions each, so a sum is off by some 1e-7, relative.
#pragma once

#include <cstdint>

#include "cpu_numbers.h"

namespace headrace {
namespace {

constexpr int64_t kSquareLanes = 16;
constexpr int64_t kSquareBlock = 64 * kSquareLanes;

#if defined(__GNUC__)
// Written with vectors, whose width AVX2 has and others put together: to GCC 12 a loop over an array of sums is one of
// loads and stores, at a fifth of the speed.
typedef float Lanes __attribute__((vector_size(kSquareLanes / 2 * sizeof(float)), aligned(4), may_alias));
typedef uint32_t LaneBits __attribute__((vector_size(kSquareLanes / 2 * sizeof(float))));
typedef uint16_t HalfLanes __attribute__((vector_size(kSquareLanes / 2 * sizeof(uint16_t)), aligned(2), may_alias));

// Not returned: without AVX there is no register to return them in, which GCC warns of.
HEADRACE_INLINE void load_lanes(Lanes& to, const float* numbers) { to = *reinterpret_cast<const Lanes*>(numbers); }
HEADRACE_INLINE void load_lanes(Lanes& to, const BFloat16* numbers) {
  const LaneBits bits = __builtin_convertvector(*reinterpret_cast<const HalfLanes*>(numbers), LaneBits) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}
#endif

// Of `count` numbers, at most kSquareBlock. Compile with fp-contract=off.
template <typename T>
HEADRACE_INLINE double square_sum_of_block(const T* numbers, int64_t count) {
  float sums[kSquareLanes] = {};
  int64_t i = 0;
#if defined(__GNUC__)
  Lanes low = {}, high = {};
  for (; i + kSquareLanes <= count; i += kSquareLanes) {
    Lanes a, b;
    load_lanes(a, numbers + i);
    load_lanes(b, numbers + i + kSquareLanes / 2);
    low += a * a;
    high += b * b;
  }
  std::memcpy(sums, &low, sizeof(low));
  std::memcpy(sums + kSquareLanes / 2, &high, sizeof(high));
#else
  for (; i + kSquareLanes <= count; i += kSquareLanes)
    for (int64_t lane = 0; lane < kSquareLanes; ++lane) sums[lane] += load(numbers[i + lane]) * load(numbers[i + lane]);
#endif
  for (int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += load(numbers[i]) * load(numbers[i]);
  double totals[kSquareLanes];
  for (int64_t lane = 0; lane < kSquareLanes; ++lane) totals[lane] = static_cast<double>(sums[lane]);
  for (int64_t half = kSquareLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) totals[lane] += totals[lane + half];
  return totals[0];
}

}  // namespace
}  // namespace headrace
