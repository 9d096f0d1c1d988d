// Bias and GELU on the GPU: one pass over memory forward and backward, in packs of 16 bytes, and a small second one over
// the partial sums of the bias's gradient. Mathematics and layout: bias_gelu.h.
#include "bias_gelu.h"

#include "device.cuh"
#include "gelu_numbers.h"

namespace headrace {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kRowLanes = kThreads / kWarp;  // backward: each warp of a block takes every eighth row of a chunk

#ifndef HEADRACE_PACKS_PER_LAUNCH  // tests lower it: nothing that fits on a small machine fills one launch
#define HEADRACE_PACKS_PER_LAUNCH (int64_t{1} << 30)
#endif
constexpr int64_t kPacksPerLaunch = HEADRACE_PACKS_PER_LAUNCH;  // so that a pack's number fits in 32 bits

struct DeviceExp {
  __device__ __forceinline__ float operator()(float x) const { return expf(x); }
};

template <typename Gelu, typename T, int N>
__global__ void __launch_bounds__(kThreads)
    bias_gelu_forward(const Pack<T, N>* __restrict__ input, const Pack<T, N>* __restrict__ bias,
                      Pack<T, N>* __restrict__ hidden, unsigned packs, unsigned row_packs) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= packs) return;
  const Pack<T, N> in = input[at], add = bias[at % row_packs];
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float z = load(in.values[i]) + load(add.values[i]);
    store(out.values[i], z * Gelu::factor(z, DeviceExp()));
  }
  hidden[at] = out;
}

// A block has one chunk of rows (of those from `first_chunk` on) and kWarp packs of columns; its numbers count through
// the tiles of columns first.
template <typename Gelu, typename T, int N>
__global__ void __launch_bounds__(kThreads)
    bias_gelu_backward(const Pack<T, N>* __restrict__ grad, const Pack<T, N>* __restrict__ input,
                       const Pack<T, N>* __restrict__ bias, Pack<T, N>* __restrict__ grad_input,
                       float* __restrict__ partial, int64_t first_chunk, int64_t rows, unsigned row_packs,
                       unsigned tiles) {
  __shared__ float sums[kRowLanes][N][kWarp + 1];  // one more: columns of a pack are then in different banks
  const unsigned lane = threadIdx.x % kWarp, row_lane = threadIdx.x / kWarp;
  const unsigned tile = blockIdx.x % tiles, pack = tile * kWarp + lane;
  const int64_t chunk = first_chunk + blockIdx.x / tiles;
  float sum[N] = {};
  if (pack < row_packs) {
    const Pack<T, N> add = bias[pack];
    const int64_t next = (chunk + 1) * kBiasGeluRows, end = next < rows ? next : rows;
    for (int64_t row = chunk * kBiasGeluRows + row_lane; row < end; row += kRowLanes) {
      const int64_t at = row * row_packs + pack;
      const Pack<T, N> upstream = grad[at], in = input[at];
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float z = load(in.values[i]) + load(add.values[i]);
        const float g = load(upstream.values[i]) * Gelu::factor_and_slope(z, DeviceExp()).slope;
        store(out.values[i], g);
        sum[i] += g;
      }
      grad_input[at] = out;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums[row_lane][i][lane] = sum[i];
  __syncthreads();
  const unsigned column = tile * kWarp * N + threadIdx.x;
  if (threadIdx.x >= kWarp * N || column >= row_packs * N) return;
  float total = 0.0f;
#pragma unroll
  for (unsigned each = 0; each < kRowLanes; ++each) total += sums[each][threadIdx.x % N][threadIdx.x / N];
  partial[chunk * row_packs * N + column] = total;
}

// Sum of `partial` over its chunks: each block has kWarp columns, each of its warps every eighth chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_gelu_sum(const float* __restrict__ partial, T* __restrict__ grad_bias, int64_t chunks, unsigned width) {
  __shared__ float sums[kRowLanes][kWarp];
  const unsigned lane = threadIdx.x % kWarp, row_lane = threadIdx.x / kWarp, column = blockIdx.x * kWarp + lane;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (int64_t chunk = row_lane; chunk < chunks; chunk += kRowLanes) sum += partial[chunk * width + column];
  }
  sums[row_lane][lane] = sum;
  __syncthreads();
  if (row_lane > 0 || column >= width) return;
#pragma unroll
  for (unsigned each = 1; each < kRowLanes; ++each) sum += sums[each][lane];
  store(grad_bias[column], sum);
}

template <typename Gelu, typename T, int N>
int launch_forward(const void* input, const void* bias, void* hidden, int64_t rows, int64_t width, void* stream) {
  const auto *in = static_cast<const Pack<T, N>*>(input), *add = static_cast<const Pack<T, N>*>(bias);
  auto* out = static_cast<Pack<T, N>*>(hidden);
  const int64_t row_packs = width / N, most = std::max<int64_t>(1, kPacksPerLaunch / row_packs);
  for (int64_t row = 0; row < rows; row += most) {
    const auto packs = static_cast<unsigned>(std::min(most, rows - row) * row_packs);
    HEADRACE_LAUNCH((bias_gelu_forward<Gelu, T, N>), (packs + kThreads - 1) / kThreads, kThreads, stream,
                    in + row * row_packs, add, out + row * row_packs, packs, static_cast<unsigned>(row_packs));
    if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  }
  return 0;
}

template <typename Gelu, typename T, int N>
int launch_backward(const void* grad, const void* input, const void* bias, void* grad_input, float* partial,
                    void* grad_bias, int64_t rows, int64_t width, void* stream) {
  const auto *upstream = static_cast<const Pack<T, N>*>(grad), *in = static_cast<const Pack<T, N>*>(input);
  const auto* add = static_cast<const Pack<T, N>*>(bias);
  auto* out = static_cast<Pack<T, N>*>(grad_input);
  const auto row_packs = static_cast<unsigned>(width / N), tiles = (row_packs + kWarp - 1) / kWarp;
  const int64_t chunks = bias_gelu_chunks(rows), most = std::max<int64_t>(1, kPacksPerLaunch / tiles);
  for (int64_t chunk = 0; chunk < chunks; chunk += most) {
    const auto blocks = static_cast<unsigned>(std::min(most, chunks - chunk) * tiles);
    HEADRACE_LAUNCH((bias_gelu_backward<Gelu, T, N>), blocks, kThreads, stream, upstream, in, add, out, partial, chunk,
                    rows, row_packs, tiles);
    if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  }
  HEADRACE_LAUNCH((bias_gelu_sum<T>), static_cast<unsigned>((width + kWarp - 1) / kWarp), kThreads, stream, partial,
                  static_cast<T*>(grad_bias), chunks, static_cast<unsigned>(width));
  return HEADRACE_LAUNCH_STATUS();
}

// 16-byte packs where rows and tensors begin on 16-byte boundaries, single numbers elsewhere.
template <typename Gelu, typename T>
int forward_of(const void* input, const void* bias, void* hidden, int64_t rows, int64_t width, void* stream) {
  const auto launch = packable<T>(width, {input, bias, hidden}) ? launch_forward<Gelu, T, kPackSize<T>>
                                                                : launch_forward<Gelu, T, 1>;
  return launch(input, bias, hidden, rows, width, stream);
}

template <typename Gelu, typename T>
int backward_of(const void* grad, const void* input, const void* bias, void* grad_input, float* partial,
                void* grad_bias, int64_t rows, int64_t width, void* stream) {
  const auto launch = packable<T>(width, {grad, input, bias, grad_input}) ? launch_backward<Gelu, T, kPackSize<T>>
                                                                          : launch_backward<Gelu, T, 1>;
  return launch(grad, input, bias, grad_input, partial, grad_bias, rows, width, stream);
}

}  // namespace

int bias_gelu_forward_cuda(Dtype dtype, bool tanh, const void* input, const void* bias, void* hidden, int64_t rows,
                           int64_t width, void* stream) {
  const auto run = dtype == Dtype::float32
                       ? (tanh ? forward_of<TanhGelu, float> : forward_of<ExactGelu, float>)
                       : (tanh ? forward_of<TanhGelu, __nv_bfloat16> : forward_of<ExactGelu, __nv_bfloat16>);
  return run(input, bias, hidden, rows, width, stream);
}

int bias_gelu_backward_cuda(Dtype dtype, bool tanh, const void* grad, const void* input, const void* bias,
                            void* grad_input, float* partial, void* grad_bias, int64_t rows, int64_t width,
                            void* stream) {
  const auto run = dtype == Dtype::float32
                       ? (tanh ? backward_of<TanhGelu, float> : backward_of<ExactGelu, float>)
                       : (tanh ? backward_of<TanhGelu, __nv_bfloat16> : backward_of<ExactGelu, __nv_bfloat16>);
  return run(grad, input, bias, grad_input, partial, grad_bias, rows, width, stream);
}

}  // namespace headrace
