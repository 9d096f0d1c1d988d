// Sums of squares on the CPU. What is summed in which order: grad_norm.h, square_sum.h.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")  // before any function: what is inlined into others must be compiled alike
#else
#pragma STDC FP_CONTRACT OFF
#endif

#include <algorithm>

#include "cpu_numbers.h"
#include "grad_norm.h"
#include "square_sum.h"

namespace headrace {
namespace {

template <typename T>
HEADRACE_INLINE double square_sum(const void* numbers, int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(numbers);
  double sum = 0.0;
  for (int64_t at = begin; at < end; at += kSquareBlock)
    sum += square_sum_of_block(from + at, std::min(kSquareBlock, end - at));
  return sum;
}

HEADRACE_FOR_EVERY_CPU
double square_sum_float32(const void* numbers, int64_t begin, int64_t end) {
  return square_sum<float>(numbers, begin, end);
}

HEADRACE_FOR_EVERY_CPU
double square_sum_bfloat16(const void* numbers, int64_t begin, int64_t end) {
  return square_sum<BFloat16>(numbers, begin, end);
}

}  // namespace

void square_sums_cpu(Dtype gradient, const GradNormTensor* tensors, int64_t count, double* partial_sums, int64_t begin,
                     int64_t end) {
  const auto sum_of = gradient == Dtype::float32 ? square_sum_float32 : square_sum_bfloat16;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const GradNormTensor& tensor = tensors[row_of(tensors, count, chunk)];
    const int64_t at = (chunk - tensor.first_chunk) * kChunk;
    partial_sums[chunk] = sum_of(tensor.gradient, at, std::min(at + kChunk, tensor.size));
  }
}

}  // namespace headrace
