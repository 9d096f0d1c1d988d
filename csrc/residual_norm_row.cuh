// Parts of the residual norm's kernels: sums over a block, packs from and to memory, statistics and norm of a row.
#pragma once

#include <cstring>

#include "device.cuh"

namespace headrace {
namespace {

// The sums over a block of whole warps, handed to all its threads, in an order that depends on its size alone. What the
// threads wrote to shared memory before can be read after it, and it may be called again at once.
template <int kCount>
__device__ __forceinline__ void block_sums(float (&sums)[kCount]) {
  __shared__ float warps[kCount][kWarp];
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (lane == 0) warps[i][warp] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = warp_sum(lane < blockDim.x / kWarp ? warps[i][lane] : 0.0f);
  __syncthreads();  // all have read: the next call may write
}

// *from, by one load where it is 16 bytes: taken apart at once, a pack of bf16 became loads of 2 bytes each in loops.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> fetch(const Pack<T, N>* __restrict__ from) {
  if constexpr (sizeof(Pack<T, N>) == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    Pack<T, N> pack;
    memcpy(&pack, &bits, sizeof(pack));
    return pack;
  } else {
    return *from;
  }
}

// N weights from number `at` on, by 16 bytes at a time where N is more than 1. fp32 weights beside bf16 activations are
// two of them.
template <int N>
__device__ __forceinline__ void load_weights(const void* __restrict__ weights, bool wide, unsigned at,
                                             float (&out)[N]) {
  if (wide) {
    constexpr int kEach = N < 4 ? N : 4;
    const auto* from = reinterpret_cast<const Pack<float, kEach>*>(static_cast<const float*>(weights) + at);
#pragma unroll
    for (int pack = 0; pack < N / kEach; ++pack) {
      const Pack<float, kEach> numbers = from[pack];
#pragma unroll
      for (int i = 0; i < kEach; ++i) out[pack * kEach + i] = numbers.values[i];
    }
  } else {
    const auto numbers =
        *reinterpret_cast<const Pack<__nv_bfloat16, N>*>(static_cast<const __nv_bfloat16*>(weights) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = load(numbers.values[i]);
  }
}

template <int N>
__device__ __forceinline__ void store_sums(float* __restrict__ to, const float (&sums)[N]) {
  constexpr int kEach = N < 4 ? N : 4;
#pragma unroll
  for (int pack = 0; pack < N / kEach; ++pack) {
    Pack<float, kEach> numbers;
#pragma unroll
    for (int i = 0; i < kEach; ++i) numbers.values[i] = sums[pack * kEach + i];
    reinterpret_cast<Pack<float, kEach>*>(to)[pack] = numbers;
  }
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> sum_of(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> sum;
#pragma unroll
  for (int i = 0; i < N; ++i) store(sum.values[i], load(a.values[i]) + load(b.values[i]));
  return sum;
}

// Mean and 1 / standard deviation of a row (RMSNorm: 0 and 1 / root mean square), in all threads of the block, from a
// thread's own numbers: each(f) calls f(number) for all of them. Thread 0 writes the row's statistics.
template <bool kLayerNorm, typename Each>
__device__ __forceinline__ void statistics(const Each& each, float width, float eps, float* __restrict__ means,
                                           float* __restrict__ rstds, float* __restrict__ square_sums, float& mean,
                                           float& rstd) {
  mean = 0.0f;
  if constexpr (kLayerNorm) {
    float sum[1] = {0.0f};
    each([&](float x) { sum[0] += x; });
    block_sums(sum);
    mean = sum[0] / width;
  }
  float squares[1] = {0.0f};
  each([&](float x) { squares[0] += (x - mean) * (x - mean); });  // mean(x^2) - mean^2 would lose digits
  block_sums(squares);
  rstd = 1.0f / sqrtf(squares[0] / width + eps);
  if (threadIdx.x != 0) return;
  if constexpr (kLayerNorm) means[blockIdx.x] = mean;
  rstds[blockIdx.x] = rstd;
  square_sums[blockIdx.x] = kLayerNorm ? squares[0] + mean * mean * width : squares[0];
}

// values -> their norm, at number `at` of the row.
template <typename T, int N, bool kLayerNorm>
__device__ __forceinline__ Pack<T, N> norm_of(const float (&values)[N], const void* __restrict__ weight,
                                              const void* __restrict__ bias, bool wide, unsigned at, float mean,
                                              float rstd) {
  float w[N], b[N];
  load_weights<N>(weight, wide, at, w);
  if constexpr (kLayerNorm) load_weights<N>(bias, wide, at, b);
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (kLayerNorm) {
      store(out.values[i], (values[i] - mean) * rstd * w[i] + b[i]);
    } else {
      store(out.values[i], values[i] * rstd * w[i]);
    }
  }
  return out;
}

}  // namespace
}  // namespace headrace
