// The update of one weight, with the same bits on every CPU and GPU and, but for a tensor's last few numbers, as torch's
// fused AdamW on CPUs with AVX2: products are rounded before they are added unless fmaf is written. (That needs
// contraction switched off: csrc/adamw_cpu.cpp does it for g++, __fmul_rn for nvcc.)
#pragma once

#include <cmath>
#include <cstring>

#include "adamw.h"

namespace headrace {
namespace {

#ifdef __CUDACC__
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
#define HEADRACE_STEP __device__ __forceinline__
#else
inline __attribute__((always_inline)) float product(float a, float b) { return a * b; }
#define HEADRACE_STEP inline __attribute__((always_inline))
#endif

HEADRACE_STEP uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

HEADRACE_STEP float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Weight and moments, before (in) and after (out), of a gradient that has been scaled.
HEADRACE_STEP void adamw_update(const AdamwFactors& f, float gradient, float& weight, float& exp_avg,
                                float& exp_avg_sq) {
  exp_avg = fmaf(f.rest1, gradient - exp_avg, f.from_gradient ? gradient : exp_avg);
  exp_avg_sq = fmaf(product(f.rest2, gradient), gradient, product(exp_avg_sq, f.beta2));
  const float root = sqrtf(exp_avg_sq) / f.root_correction2 + f.eps;
  weight = product(weight, f.decay) + product(f.minus_step_size, exp_avg) / root;
}

constexpr uint16_t kNan = 0x7fc0;

// bf16 nearest to x, ties to even.
HEADRACE_STEP uint16_t nearest(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? kNan : static_cast<uint16_t>(rounded);
}

// bf16 below or above x in size: the upper one where `random`, of 0 to 65,535, and the lower half of x carry.
HEADRACE_STEP uint16_t at_random(float x, uint32_t random) {
  const uint32_t rounded = (bits_of(x) + random) >> 16;
  return x != x ? kNan : static_cast<uint16_t>(rounded);
}

// fp32 as bf16 and remainder, and back. NaN loses its payload.
HEADRACE_STEP void split(float x, uint16_t& weight, uint16_t& remainder) {
  const uint32_t bits = bits_of(x);
  const uint32_t up = (bits >> 16) + ((bits >> 15) & 1u);
  weight = x != x ? kNan : static_cast<uint16_t>(up);
  remainder = x != x ? uint16_t{0} : static_cast<uint16_t>(bits);
}

HEADRACE_STEP float joined(uint16_t weight, uint16_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(weight) - (remainder >> 15);
  return float_of((upper << 16) | remainder);
}

// 16 random bits for number `place` of the model: squares32 (arXiv 2004.06278), a counter-based generator.
HEADRACE_STEP uint32_t random16(uint64_t place, uint64_t key) {
  const uint64_t y = place * key, z = y + key;
  uint64_t x = y;
  x = x * x + y;
  x = (x >> 32) | (x << 32);
  x = x * x + z;
  x = (x >> 32) | (x << 32);
  x = x * x + y;
  x = (x >> 32) | (x << 32);
  return static_cast<uint32_t>((x * x + z) >> 48);
}

}  // namespace
}  // namespace headrace
