// Sums of squares on the GPU: one block for each chunk, one for each tensor, one for all. What is summed: grad_norm.h.
#include "grad_norm.h"

#include "chunk_sums.cuh"
#include "device.cuh"
#include "launch.h"

namespace headrace {
namespace {

constexpr unsigned kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    square_chunks(const GradNormTensor* __restrict__ tensors, int64_t count, float* __restrict__ partial_sums) {
  constexpr int kNumbers = kPackSize<T>;
  const int64_t chunk = blockIdx.x;
  const GradNormTensor tensor = tensors[row_of(tensors, count, chunk)];
  const T* gradient = static_cast<const T*>(tensor.gradient);
  HEADRACE_GLOBAL(gradient);
  const int64_t begin = (chunk - tensor.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < tensor.size ? begin + kChunk : tensor.size;
  float sum = 0.0f;
  int64_t at = begin;
  if (tensor.packed) {
    const int64_t packs = (end - begin) / kNumbers;
    const auto* pack = reinterpret_cast<const Pack<T, kNumbers>*>(gradient + begin);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
      const Pack<T, kNumbers> numbers = pack[i];
#pragma unroll
      for (int j = 0; j < kNumbers; ++j) sum += load(numbers.values[j]) * load(numbers.values[j]);
    }
    at += packs * kNumbers;
  }
  for (int64_t i = at + threadIdx.x; i < end; i += kThreads) sum += load(gradient[i]) * load(gradient[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial_sums[chunk] = sum;
}

__global__ void __launch_bounds__(kThreads)
    add_tensors(const double* __restrict__ sums, int64_t count, double* __restrict__ total,
                float* __restrict__ not_finite) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *total = sum;
    *not_finite = sum - sum == 0.0 ? 0.0f : 1.0f;
  }
}

}  // namespace

int square_sums_cuda(Dtype gradient, const GradNormTensor* tensors, int64_t count, int64_t chunks, float* partial_sums,
                     double* sums, double* total, float* not_finite, void* stream) {
  if (chunks > 0) {
    const unsigned blocks = static_cast<unsigned>(chunks);
    if (gradient == Dtype::float32) {
      HEADRACE_LAUNCH((square_chunks<float>), blocks, kThreads, stream, tensors, count, partial_sums);
    } else {
      HEADRACE_LAUNCH((square_chunks<__nv_bfloat16>), blocks, kThreads, stream, tensors, count, partial_sums);
    }
    if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  }
  HEADRACE_LAUNCH((add_chunks<GradNormTensor, 1>), static_cast<unsigned>(count), kSumThreads, stream, tensors,
                  partial_sums, sums);
  if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  HEADRACE_LAUNCH(add_tensors, 1, kThreads, stream, sums, count, total, not_finite);
  return HEADRACE_LAUNCH_STATUS();
}

}  // namespace headrace
