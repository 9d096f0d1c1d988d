// AdamW on the GPU: one block for each chunk of the table, eight numbers a thread at a time. Mathematics: adamw.h.
#include "adamw.h"

#include "adamw_update.h"
#include "chunk_sums.cuh"
#include "device.cuh"
#include "launch.h"

namespace headrace {
namespace {

constexpr unsigned kThreads = 256;
// A thread has 128 bytes and more on their way at a time: 512 threads of an SM keep all of its bandwidth busy. Asked for
// more blocks, ptxas spills.
constexpr unsigned kBlocksAtOnce = 2;
constexpr int kNumbers = 8;  // 16 bytes of bf16, and twice that of fp32

template <typename T>
struct alignas(16) Eight {
  T values[kNumbers];
};

// Numbers [0, count) at `from`; the others are 0.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from, int count, bool packed) {
  if (packed) return *reinterpret_cast<const Eight<T>*>(from);
  Eight<T> numbers;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) numbers.values[i] = i < count ? from[i] : T(0);
  return numbers;
}

template <typename T>
__device__ __forceinline__ void store_eight(T* to, const Eight<T>& numbers, int count, bool packed) {
  if (packed) {
    *reinterpret_cast<Eight<T>*>(to) = numbers;
    return;
  }
#pragma unroll
  for (int i = 0; i < kNumbers; ++i)
    if (i < count) to[i] = numbers.values[i];
}

// bf16 is handled as its bits: what is stored is rounded here, not by CUDA.
__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

template <AdamwMode mode, typename Gradient, bool sums>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    update_chunks(const AdamwTensor* __restrict__ tensors, int64_t count, const double* __restrict__ grad_norm,
                  double max_norm, float* __restrict__ partial_sums) {
  constexpr bool master = mode == AdamwMode::master || mode == AdamwMode::master_and_copy;
  const int64_t chunk = blockIdx.x;
  const AdamwTensor& tensor = tensors[row_of(tensors, count, chunk)];
  float of_gradient = 0.0f, of_change = 0.0f, of_weight = 0.0f;
  const double norm = grad_norm == nullptr ? 0.0 : *grad_norm;
  if (norm - norm == 0.0) {
    const float scale = clip_scale(norm, max_norm);
    const AdamwFactors factors = tensor.factors;
    float* full = static_cast<float*>(tensor.weight);
    uint16_t* half = static_cast<uint16_t*>(master ? tensor.low : tensor.weight);
    uint16_t* remainder = static_cast<uint16_t*>(tensor.low);
    const Gradient* gradient = static_cast<const Gradient*>(tensor.gradient);
    float *exp_avg = tensor.exp_avg, *exp_avg_sq = tensor.exp_avg_sq;
    HEADRACE_GLOBAL(full);
    if (mode != AdamwMode::master) HEADRACE_GLOBAL(half);
    if (mode == AdamwMode::remainder) HEADRACE_GLOBAL(remainder);
    HEADRACE_GLOBAL(gradient);
    HEADRACE_GLOBAL(exp_avg);
    HEADRACE_GLOBAL(exp_avg_sq);
    const bool all_packed = tensor.packed != 0;
    const uint64_t base = tensor.base, key = tensor.key;
    const int64_t begin = (chunk - tensor.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < tensor.size ? begin + kChunk : tensor.size;
    for (int64_t at = begin + threadIdx.x * kNumbers; at < end; at += kThreads * kNumbers) {
      const int here = end - at < kNumbers ? static_cast<int>(end - at) : kNumbers;
      const bool packed = all_packed && here == kNumbers;
      const Eight<Gradient> gradients = load_eight(gradient + at, here, packed);
      Eight<float> means = load_eight(exp_avg + at, here, packed);
      Eight<float> squares = load_eight(exp_avg_sq + at, here, packed);
      Eight<float> weights;
      Eight<uint16_t> halves, remainders;
      if (master) weights = load_eight(full + at, here, packed);
      if (!master) halves = load_eight(half + at, here, packed);
      if (mode == AdamwMode::remainder) remainders = load_eight(remainder + at, here, packed);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        const float g = number(gradients.values[i]);
        const float before = master                         ? weights.values[i]
                             : mode == AdamwMode::remainder ? joined(halves.values[i], remainders.values[i])
                                                            : number(halves.values[i]);
        float weight = before;
        adamw_update(factors, product(g, scale), weight, means.values[i], squares.values[i]);
        if (master) weights.values[i] = weight;
        if (mode == AdamwMode::master_and_copy) halves.values[i] = nearest(weight);
        if (mode == AdamwMode::remainder) split(weight, halves.values[i], remainders.values[i]);
        if (mode == AdamwMode::stochastic) {
          const uint64_t place = base + static_cast<uint64_t>(at + i);
          halves.values[i] = at_random(weight, random16(place, key));
          weight = number(halves.values[i]);
        }
        if (sums && i < here) {
          of_gradient += g * g;
          of_change += (weight - before) * (weight - before);
          of_weight += before * before;
        }
      }
      store_eight(exp_avg + at, means, here, packed);
      store_eight(exp_avg_sq + at, squares, here, packed);
      if (master) store_eight(full + at, weights, here, packed);
      if (mode != AdamwMode::master) store_eight(half + at, halves, here, packed);
      if (mode == AdamwMode::remainder) store_eight(remainder + at, remainders, here, packed);
    }
  }
  if (sums) {
    of_gradient = block_sum(of_gradient);
    of_change = block_sum(of_change);
    of_weight = block_sum(of_weight);
    if (threadIdx.x == 0) {
      partial_sums[3 * chunk] = of_gradient;
      partial_sums[3 * chunk + 1] = of_change;
      partial_sums[3 * chunk + 2] = of_weight;
    }
  }
}

struct Arguments {
  const AdamwTensor* tensors;
  int64_t count, chunks;
  const double* grad_norm;
  double max_norm;
  float* partial_sums;
  double* sums;
  void* stream;
};

template <AdamwMode mode, typename Gradient, bool sums>
void launch(const Arguments& to) {
  HEADRACE_LAUNCH((update_chunks<mode, Gradient, sums>), static_cast<unsigned>(to.chunks), kThreads, to.stream,
                  to.tensors, to.count, to.grad_norm, to.max_norm, to.partial_sums);
}

template <AdamwMode mode>
int run(Dtype gradient, const Arguments& to) {
  if (to.chunks > 0) {
    const bool full = gradient == Dtype::float32;
    if (to.sums != nullptr) {
      full ? launch<mode, float, true>(to) : launch<mode, uint16_t, true>(to);
    } else {
      full ? launch<mode, float, false>(to) : launch<mode, uint16_t, false>(to);
    }
    if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  }
  if (to.sums == nullptr) return 0;
  HEADRACE_LAUNCH((add_chunks<AdamwTensor, 3>), static_cast<unsigned>(to.count), kSumThreads, to.stream, to.tensors,
                  to.partial_sums, to.sums);
  return HEADRACE_LAUNCH_STATUS();
}

}  // namespace

int adamw_cuda(AdamwMode mode, Dtype gradient, const AdamwTensor* tensors, int64_t count, int64_t chunks,
               const double* grad_norm, double max_norm, float* partial_sums, double* sums, void* stream) {
  const Arguments to{tensors, count, chunks, grad_norm, max_norm, partial_sums, sums, stream};
  switch (mode) {
    case AdamwMode::master:
      return run<AdamwMode::master>(gradient, to);
    case AdamwMode::master_and_copy:
      return run<AdamwMode::master_and_copy>(gradient, to);
    case AdamwMode::remainder:
      return run<AdamwMode::remainder>(gradient, to);
    default:
      return run<AdamwMode::stochastic>(gradient, to);
  }
}

}  // namespace headrace
