// For CPU kernels: loops over fp32 or bf16 numbers that the compiler turns into vector instructions.
//
//   template <typename T>
//   HEADRACE_INLINE void halve(const T* x, T* y, int64_t count) {
//     for (int64_t i = 0; i < count; ++i) store(y[i], 0.5f * load(x[i]));
//   }
//   HEADRACE_FOR_EVERY_CPU void halve_bfloat16(const void* x, void* y, int64_t count) {
//     halve(static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y), count);
//   }
//
// Whatever a HEADRACE_FOR_EVERY_CPU function calls in its loops must be HEADRACE_INLINE, lambdas too
// (`[&](int64_t i) HEADRACE_INLINE_LAMBDA { ... }`): a call is neither vectorised nor compiled for that CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// The package is built for any x86-64; GCC adds an AVX2 and an AVX-512 version of each loop and picks one when the
// library is loaded. With SSE2 alone SwiGLU took 2.3 ns for each fp32 number of `hidden`, with AVX2 0.7 ns.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define HEADRACE_FOR_EVERY_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HEADRACE_FOR_EVERY_CPU
#endif
#define HEADRACE_INLINE inline __attribute__((always_inline))
#define HEADRACE_INLINE_LAMBDA __attribute__((always_inline))

namespace headrace {
namespace {

template <typename To, typename From>
HEADRACE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

HEADRACE_INLINE float load(const float& x) { return x; }
HEADRACE_INLINE float load(const BFloat16& x) { return bits_as<float>(uint32_t{x.bits} << 16); }
HEADRACE_INLINE void store(float& to, float x) { to = x; }
HEADRACE_INLINE void store(BFloat16& to, float x) {
  // Rounds to nearest, ties to even. NaN stays NaN: loaded from bf16 or made by arithmetic, its lower half is 0, so that
  // nothing carries into its upper half.
  const uint32_t bits = bits_as<uint32_t>(x);
  to.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// exp(x), off by at most 1.2 units in fp32's last place; NaN stays NaN, infinities go to infinity and 0, and so does
// what is above fp32's range or below its normal numbers (1.2e-38). std::exp would be a call for each number and keep
// the loop from being vectorised. Cephes' expf (S. Moshier): exp(x) = 2^n * p(r).
HEADRACE_INLINE float exp(float x) {
  float z = x > 89.0f ? 89.0f : x;    // exp(89) is above fp32's range: infinity, as it should be
  z = z < -87.0f ? -87.0f : z;        // replaced below
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const float shifted = z * 1.44269504088896341f + shift;
  const float n = shifted - shift;
  const float r = (z - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^(n-1), then twice that: n = 128 is reached, and 2^128 is no fp32 number.
  const float half = bits_as<float>((bits_as<uint32_t>(shifted) + 126u) << 23);
  const float power = p * half * 2.0f;
  return x < -87.0f ? 0.0f : power;
}

// Sum of term(i) for i in [0, count): sixteen interleaved sums, added pairwise at the end. A plain loop may not be
// vectorised, since that changes the order of the additions; this is an order that vectors keep.
template <typename Term>
HEADRACE_INLINE float sum(int64_t count, const Term& term) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace
}  // namespace headrace
