// AdamW on the CPU: loops that the compiler turns into vector instructions. Mathematics and layout: adamw.h.

// Before any function: what is inlined into others must be compiled alike. See adamw_update.h.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

#include <algorithm>

#include "adamw.h"
#include "adamw_update.h"
#include "cpu_numbers.h"
#include "square_sum.h"

namespace headrace {
namespace {

// A block of a tensor: gradients in fp32, and for the sums what the weights were and by how much they changed. 12 KiB,
// so it stays in the first cache.
struct Block {
  float gradient[kSquareBlock], change[kSquareBlock], weight[kSquareBlock];
};

template <AdamwMode mode, bool sums>
HEADRACE_INLINE void update_block(const AdamwTensor& tensor, const float* __restrict gradient, int64_t at,
                                  int64_t count, float scale, Block& block) {
  constexpr bool master = mode == AdamwMode::master || mode == AdamwMode::master_and_copy;
  const AdamwFactors factors = tensor.factors;
  float* __restrict full = static_cast<float*>(tensor.weight) + at;
  uint16_t* __restrict half = static_cast<uint16_t*>(master ? tensor.low : tensor.weight) + at;
  uint16_t* __restrict remainder = static_cast<uint16_t*>(tensor.low) + at;
  float* __restrict exp_avg = tensor.exp_avg + at;
  float* __restrict exp_avg_sq = tensor.exp_avg_sq + at;
  const uint64_t place = tensor.base + static_cast<uint64_t>(at), key = tensor.key;
  for (int64_t i = 0; i < count; ++i) {
    const float before = master                           ? full[i]
                         : mode == AdamwMode::remainder   ? joined(half[i], remainder[i])
                                                          : float_of(uint32_t{half[i]} << 16);
    float weight = before, mean = exp_avg[i], square = exp_avg_sq[i];
    adamw_update(factors, product(gradient[i], scale), weight, mean, square);
    exp_avg[i] = mean;
    exp_avg_sq[i] = square;
    if (master) full[i] = weight;
    if (mode == AdamwMode::master_and_copy) half[i] = nearest(weight);
    if (mode == AdamwMode::remainder) split(weight, half[i], remainder[i]);
    if (mode == AdamwMode::stochastic) {
      half[i] = at_random(weight, random16(place + static_cast<uint64_t>(i), key));
      weight = float_of(uint32_t{half[i]} << 16);
    }
    if (sums) {
      block.change[i] = weight - before;
      block.weight[i] = before;
    }
  }
}

template <AdamwMode mode, bool sums>
HEADRACE_INLINE void update_chunk(const AdamwTensor& tensor, Dtype dtype, int64_t begin, int64_t end, float scale,
                                  double* totals) {
  Block block;
  double of_gradient = 0.0, of_change = 0.0, of_weight = 0.0;
  for (int64_t at = begin; at < end; at += kSquareBlock) {
    const int64_t count = std::min(kSquareBlock, end - at);
    const float* gradient = static_cast<const float*>(tensor.gradient) + at;
    if (dtype == Dtype::bfloat16) {
      const BFloat16* from = static_cast<const BFloat16*>(tensor.gradient) + at;
      for (int64_t i = 0; i < count; ++i) block.gradient[i] = load(from[i]);
      gradient = block.gradient;
    }
    update_block<mode, sums>(tensor, gradient, at, count, scale, block);
    if (sums) {
      of_gradient += square_sum_of_block(gradient, count);
      of_change += square_sum_of_block(block.change, count);
      of_weight += square_sum_of_block(block.weight, count);
    }
  }
  if (sums) {
    totals[0] = of_gradient;
    totals[1] = of_change;
    totals[2] = of_weight;
  }
}

#define HEADRACE_ADAMW(name, mode)                                                                                \
  HEADRACE_FOR_EVERY_CPU                                                                                          \
  void name(const AdamwTensor& tensor, Dtype dtype, int64_t begin, int64_t end, float scale, double* totals) {    \
    if (totals != nullptr) {                                                                                      \
      update_chunk<mode, true>(tensor, dtype, begin, end, scale, totals);                                         \
    } else {                                                                                                      \
      update_chunk<mode, false>(tensor, dtype, begin, end, scale, totals);                                        \
    }                                                                                                             \
  }

HEADRACE_ADAMW(master, AdamwMode::master)
HEADRACE_ADAMW(master_and_copy, AdamwMode::master_and_copy)
HEADRACE_ADAMW(remainder, AdamwMode::remainder)
HEADRACE_ADAMW(stochastic, AdamwMode::stochastic)

#undef HEADRACE_ADAMW

}  // namespace

void adamw_cpu(AdamwMode mode, Dtype gradient, const AdamwTensor* tensors, int64_t count, float scale, double* sums,
               int64_t begin, int64_t end) {
  const auto update = mode == AdamwMode::master            ? master
                      : mode == AdamwMode::master_and_copy ? master_and_copy
                      : mode == AdamwMode::remainder       ? remainder
                                                           : stochastic;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const AdamwTensor& tensor = tensors[row_of(tensors, count, chunk)];
    const int64_t at = (chunk - tensor.first_chunk) * kChunk;
    update(tensor, gradient, at, std::min(at + kChunk, tensor.size), scale, sums == nullptr ? nullptr : sums + 3 * chunk);
  }
}

}  // namespace headrace
