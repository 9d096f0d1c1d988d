// Residual addition and norm on the GPU. Mathematics and layout: residual_norm.h.
//
// Forward: a block for each row, which it keeps in registers between the statistics and the norm. Backward: as many
// blocks as the GPU runs at once, each taking every gridDim.x-th row; a thread has the same columns in all of them, so
// that the sums over rows for the weights stay in its registers too. A second kernel adds the blocks' sums in order.
// Rows that are too long for registers, or not made of whole 16-byte packs, are read again instead: slower, as right.
#include "residual_norm.h"

#include <algorithm>

#include "residual_norm_row.cuh"

namespace headrace {
namespace {

constexpr unsigned kMostThreads = 512;  // of a block that keeps its row: 128 registers each
constexpr unsigned kRereadThreads = 512;

// Most threads of a block whose threads keep `packs` of at most `most`. Small blocks, since all wait at each barrier.
constexpr unsigned threads_for(int packs, int most) { return packs == most ? kMostThreads : 128 * packs; }

// Most packs that a thread keeps. Backward needs four times as many registers for each number.
constexpr int kForwardPacks = 4;
template <int N>
constexpr int kBackwardPacks = 16 / N;

template <typename T, int N, int kPacks, bool kLayerNorm>
__global__ void __launch_bounds__(threads_for(kPacks, kForwardPacks))
    forward(const Pack<T, N>* __restrict__ x, const Pack<T, N>* __restrict__ residual, const void* __restrict__ weight,
            const void* __restrict__ bias, bool wide, Pack<T, N>* __restrict__ stream,
            Pack<T, N>* __restrict__ normalised, float* __restrict__ means, float* __restrict__ rstds,
            float* __restrict__ square_sums, unsigned packs, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * packs;
  Pack<T, N> added[kPacks], kept[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const unsigned at = threadIdx.x + i * blockDim.x;
    if (at < packs) {
      kept[i] = x[row + at];
      if (residual != nullptr) added[i] = residual[row + at];
    }
  }
  float values[kPacks][N];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const unsigned at = threadIdx.x + i * blockDim.x;
    if (at < packs) {
      if (residual != nullptr) {
        kept[i] = sum_of(kept[i], added[i]);
        stream[row + at] = kept[i];
      }
#pragma unroll
      for (int j = 0; j < N; ++j) values[i][j] = load(kept[i].values[j]);
    }
  }
  float mean, rstd;
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (threadIdx.x + i * blockDim.x < packs) {
#pragma unroll
        for (int j = 0; j < N; ++j) f(values[i][j]);
      }
    }
  };
  statistics<kLayerNorm>(each, static_cast<float>(packs) * N, eps, means, rstds, square_sums, mean, rstd);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const unsigned at = threadIdx.x + i * blockDim.x;
    if (at < packs)
      normalised[row + at] = norm_of<T, N, kLayerNorm>(values[i], weight, bias, wide, at * N, mean, rstd);
  }
}

template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(kRereadThreads)
    forward_rereading(const Pack<T, N>* __restrict__ x, const Pack<T, N>* __restrict__ residual,
                      const void* __restrict__ weight, const void* __restrict__ bias, bool wide, Pack<T, N>* stream,
                      Pack<T, N>* __restrict__ normalised, float* __restrict__ means, float* __restrict__ rstds,
                      float* __restrict__ square_sums, unsigned packs, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * packs;
  const Pack<T, N>* from = residual != nullptr ? stream : x;
  if (residual != nullptr) {  // read again only by the thread that writes it, so without a barrier
    for (unsigned at = threadIdx.x; at < packs; at += blockDim.x)
      stream[row + at] = sum_of(fetch(x + row + at), fetch(residual + row + at));
  }
  float mean, rstd;
  const auto each = [&](const auto& f) {
    for (unsigned at = threadIdx.x; at < packs; at += blockDim.x) {
      const Pack<T, N> pack = fetch(from + row + at);
#pragma unroll
      for (int j = 0; j < N; ++j) f(load(pack.values[j]));
    }
  };
  statistics<kLayerNorm>(each, static_cast<float>(packs) * N, eps, means, rstds, square_sums, mean, rstd);
  for (unsigned at = threadIdx.x; at < packs; at += blockDim.x) {
    const Pack<T, N> pack = fetch(from + row + at);
    float values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = load(pack.values[j]);
    normalised[row + at] = norm_of<T, N, kLayerNorm>(values, weight, bias, wide, at * N, mean, rstd);
  }
}

// What a pack adds to the row's two sums, and to the sums over rows.
template <typename T, int N, bool kLayerNorm>
__device__ __forceinline__ void gather(const Pack<T, N>& upstream, const Pack<T, N>& stream, const float (&weight)[N],
                                       float mean, float rstd, float (&sums)[kLayerNorm ? 2 : 1],
                                       float (&grad_weight)[N], float (&grad_bias)[kLayerNorm ? N : 1]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float n = load(upstream.values[i]);
    const float centred = (load(stream.values[i]) - (kLayerNorm ? mean : 0.0f)) * rstd;
    const float g = n * weight[i];
    sums[0] += g * centred;
    grad_weight[i] += n * centred;
    if constexpr (kLayerNorm) {
      sums[1] += g;
      grad_bias[i] += n;
    }
  }
}

// The gradient of the stream without what arrives at it directly: `slope` and `level` are the row's sums / width.
template <typename T, int N, bool kLayerNorm>
__device__ __forceinline__ void through_norm(const Pack<T, N>& upstream, const Pack<T, N>& stream,
                                             const float (&weight)[N], float mean, float rstd, float slope, float level,
                                             float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float centred = (load(stream.values[i]) - (kLayerNorm ? mean : 0.0f)) * rstd;
    float through = load(upstream.values[i]) * weight[i] - centred * slope;
    if constexpr (kLayerNorm) through -= level;
    out[i] = rstd * through;
  }
}

template <typename T, int N, int kPacks, bool kLayerNorm>
__global__ void __launch_bounds__(threads_for(kPacks, kBackwardPacks<N>))
    backward(const Pack<T, N>* __restrict__ grad_normalised, const Pack<T, N>* __restrict__ grad_stream,
             const Pack<T, N>* __restrict__ stream, const void* __restrict__ weight, bool wide,
             const float* __restrict__ means, const float* __restrict__ rstds, Pack<T, N>* __restrict__ grad,
             float* __restrict__ weight_sums, float* __restrict__ bias_sums, unsigned rows, unsigned packs) {
  constexpr int kBias = kLayerNorm ? N : 1;
  const float width = static_cast<float>(packs) * N;
  float weights[kPacks][N], grad_weight[kPacks][N] = {}, grad_bias[kPacks][kBias] = {};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const unsigned at = threadIdx.x + i * blockDim.x;
    if (at < packs) load_weights<N>(weight, wide, at * N, weights[i]);
  }
  for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t begin = static_cast<int64_t>(row) * packs;
    Pack<T, N> upstream[kPacks], values[kPacks], direct[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const unsigned at = threadIdx.x + i * blockDim.x;
      if (at < packs) {
        upstream[i] = grad_normalised[begin + at];
        values[i] = stream[begin + at];
        if (grad_stream != nullptr) direct[i] = grad_stream[begin + at];
      }
    }
    const float rstd = rstds[row], mean = kLayerNorm ? means[row] : 0.0f;
    float sums[kLayerNorm ? 2 : 1] = {};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (threadIdx.x + i * blockDim.x < packs)
        gather<T, N, kLayerNorm>(upstream[i], values[i], weights[i], mean, rstd, sums, grad_weight[i], grad_bias[i]);
    }
    block_sums(sums);
    const float slope = sums[0] / width, level = kLayerNorm ? sums[kLayerNorm ? 1 : 0] / width : 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const unsigned at = threadIdx.x + i * blockDim.x;
      if (at < packs) {
        float through[N];
        through_norm<T, N, kLayerNorm>(upstream[i], values[i], weights[i], mean, rstd, slope, level, through);
        Pack<T, N> out;
#pragma unroll
        for (int j = 0; j < N; ++j)
          store(out.values[j], grad_stream != nullptr ? load(direct[i].values[j]) + through[j] : through[j]);
        grad[begin + at] = out;
      }
    }
  }
  const int64_t group = static_cast<int64_t>(blockIdx.x) * packs * N;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const unsigned at = threadIdx.x + i * blockDim.x;
    if (at < packs) {
      store_sums<N>(weight_sums + group + static_cast<int64_t>(at) * N, grad_weight[i]);
      if constexpr (kLayerNorm) store_sums<N>(bias_sums + group + static_cast<int64_t>(at) * N, grad_bias[i]);
    }
  }
}

template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(kRereadThreads)
    backward_rereading(const Pack<T, N>* __restrict__ grad_normalised, const Pack<T, N>* __restrict__ grad_stream,
                       const Pack<T, N>* __restrict__ stream, const void* __restrict__ weight, bool wide,
                       const float* __restrict__ means, const float* __restrict__ rstds, Pack<T, N>* __restrict__ grad,
                       float* __restrict__ weight_sums, float* __restrict__ bias_sums, unsigned rows, unsigned packs) {
  constexpr int kBias = kLayerNorm ? N : 1;
  const float width = static_cast<float>(packs) * N;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * packs * N;
  for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t begin = static_cast<int64_t>(row) * packs;
    const float rstd = rstds[row], mean = kLayerNorm ? means[row] : 0.0f;
    float sums[kLayerNorm ? 2 : 1] = {};
    for (unsigned at = threadIdx.x; at < packs; at += blockDim.x) {
      // A thread's columns are its own: it finds what it left here in the block's last row.
      float* weight_sum = weight_sums + group + static_cast<int64_t>(at) * N;
      float* bias_sum = kLayerNorm ? bias_sums + group + static_cast<int64_t>(at) * N : nullptr;
      float weights[N], grad_weight[N] = {}, grad_bias[kBias] = {};
      if (row != blockIdx.x) {
#pragma unroll
        for (int i = 0; i < N; ++i) grad_weight[i] = weight_sum[i];
        if constexpr (kLayerNorm) {
#pragma unroll
          for (int i = 0; i < N; ++i) grad_bias[i] = bias_sum[i];
        }
      }
      load_weights<N>(weight, wide, at * N, weights);
      gather<T, N, kLayerNorm>(fetch(grad_normalised + begin + at), fetch(stream + begin + at), weights, mean, rstd,
                               sums, grad_weight, grad_bias);
      store_sums<N>(weight_sum, grad_weight);
      if constexpr (kLayerNorm) store_sums<N>(bias_sum, grad_bias);
    }
    block_sums(sums);
    const float slope = sums[0] / width, level = kLayerNorm ? sums[kLayerNorm ? 1 : 0] / width : 0.0f;
    for (unsigned at = threadIdx.x; at < packs; at += blockDim.x) {
      float weights[N], through[N];
      load_weights<N>(weight, wide, at * N, weights);
      through_norm<T, N, kLayerNorm>(fetch(grad_normalised + begin + at), fetch(stream + begin + at), weights, mean,
                                     rstd, slope, level, through);
      Pack<T, N> out;
      if (grad_stream != nullptr) {
        const Pack<T, N> direct = fetch(grad_stream + begin + at);
#pragma unroll
        for (int i = 0; i < N; ++i) store(out.values[i], load(direct.values[i]) + through[i]);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) store(out.values[i], through[i]);
      }
      grad[begin + at] = out;
    }
  }
}

constexpr unsigned kSumWarps = 16;

// Sums over groups, a warp's width of columns for each block: its warps take every kSumWarps-th group, the first warp
// then adds what they found. Loads of 4 bytes, so that a row of a few thousand columns keeps more than a few
// multiprocessors busy.
template <typename W>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    sum_groups(const float* __restrict__ sums, W* __restrict__ out, int64_t groups, int64_t width) {
  __shared__ float found[kSumWarps][kWarp];
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (column < width)
    for (int64_t group = warp; group < groups; group += kSumWarps) sum += sums[group * width + column];
  found[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= width) return;
#pragma unroll
  for (unsigned i = 1; i < kSumWarps; ++i) sum += found[i][lane];
  store(out[column], sum);
}

// How a row is laid over a block: each thread has `kept` packs of it in registers; 0: it is read again.
struct Shape {
  int kept;
  unsigned threads;
};

Shape shape_of(int64_t packs, int most) {
  for (const int kept : {1, 2, 4}) {
    const int64_t threads = ((packs + kept - 1) / kept + kWarp - 1) / kWarp * kWarp;
    if (kept <= most && threads <= threads_for(kept, most)) return {kept, static_cast<unsigned>(threads)};
  }
  return {0, kRereadThreads};
}

template <typename T>
bool wide_packs(const ResidualNormForward& call) {
  return packable<T>(call.width, {call.x, call.residual, call.weight, call.bias, call.stream, call.normalised});
}

template <typename T>
bool wide_packs(const ResidualNormBackward& call) {
  return packable<T>(call.width, {call.grad_normalised, call.grad_stream, call.stream, call.weight, call.grad,
                                  call.partial_sums});
}

template <typename T, int N, int kPacks, bool kLayerNorm>
void launch(const ResidualNormForward& call, unsigned threads, void* stream) {
  using Numbers = Pack<T, N>;
  constexpr auto kernel = [] {
    if constexpr (kPacks == 0) return forward_rereading<T, N, kLayerNorm>;
    else return forward<T, N, kPacks, kLayerNorm>;
  }();
  HEADRACE_LAUNCH((kernel), static_cast<unsigned>(call.rows), threads, stream, static_cast<const Numbers*>(call.x),
                  static_cast<const Numbers*>(call.residual), call.weight, call.bias,
                  call.weight_dtype == Dtype::float32, static_cast<Numbers*>(call.stream),
                  static_cast<Numbers*>(call.normalised), call.mean, call.rstd, call.square_sum,
                  static_cast<unsigned>(call.width / N), call.eps);
}

template <typename T, int N, int kPacks, bool kLayerNorm>
void launch(const ResidualNormBackward& call, unsigned threads, void* stream) {
  using Numbers = Pack<T, N>;
  constexpr auto kernel = [] {
    if constexpr (kPacks == 0) return backward_rereading<T, N, kLayerNorm>;
    else return backward<T, N, kPacks, kLayerNorm>;
  }();
  HEADRACE_LAUNCH((kernel), static_cast<unsigned>(call.groups), threads, stream,
                  static_cast<const Numbers*>(call.grad_normalised), static_cast<const Numbers*>(call.grad_stream),
                  static_cast<const Numbers*>(call.stream), call.weight, call.weight_dtype == Dtype::float32, call.mean,
                  call.rstd, static_cast<Numbers*>(call.grad), call.partial_sums,
                  call.partial_sums + call.groups * call.width, static_cast<unsigned>(call.rows),
                  static_cast<unsigned>(call.width / N));
}

template <typename T, bool kLayerNorm, int kMost, typename Call>
void launch_kind(const Call& call, void* stream) {
  constexpr int N = kPackSize<T>;
  if (!wide_packs<T>(call)) return launch<T, 1, 0, kLayerNorm>(call, kRereadThreads, stream);
  const Shape shape = shape_of(call.width / N, kMost);
  if (shape.kept == 0) return launch<T, N, 0, kLayerNorm>(call, shape.threads, stream);
  if (shape.kept == 1) return launch<T, N, 1, kLayerNorm>(call, shape.threads, stream);
  if (shape.kept == 2) return launch<T, N, 2, kLayerNorm>(call, shape.threads, stream);
  if constexpr (kMost == 4) launch<T, N, 4, kLayerNorm>(call, shape.threads, stream);
}

template <typename W>
void launch_sums(const ResidualNormBackward& call, void* stream) {
  const auto blocks = static_cast<unsigned>((call.width + kWarp - 1) / kWarp);
  HEADRACE_LAUNCH((sum_groups<W>), blocks, kSumWarps * kWarp, stream, call.partial_sums,
                  static_cast<W*>(call.grad_weight), call.groups, call.width);
  if (call.layer_norm)
    HEADRACE_LAUNCH((sum_groups<W>), blocks, kSumWarps * kWarp, stream, call.partial_sums + call.groups * call.width,
                    static_cast<W*>(call.grad_bias), call.groups, call.width);
}

}  // namespace

int64_t residual_norm_groups_cuda(Dtype dtype, int64_t rows, int64_t width, int64_t multiprocessors) {
  const bool wide = dtype == Dtype::float32;
  const int64_t packs = width / (wide ? kPackSize<float> : kPackSize<__nv_bfloat16>);
  const Shape shape = shape_of(packs, wide ? kBackwardPacks<kPackSize<float>> : kBackwardPacks<kPackSize<__nv_bfloat16>>);
  // A multiprocessor has registers for 512 threads that use 128 each; it is never left with less than one block.
  return std::min(rows, multiprocessors * std::max<int64_t>(1, kMostThreads / std::max(shape.threads, kWarp)));
}

int residual_norm_forward_cuda(const ResidualNormForward& call, void* stream) {
  if (call.dtype == Dtype::float32) {
    call.layer_norm ? launch_kind<float, true, kForwardPacks>(call, stream)
                    : launch_kind<float, false, kForwardPacks>(call, stream);
  } else {
    call.layer_norm ? launch_kind<__nv_bfloat16, true, kForwardPacks>(call, stream)
                    : launch_kind<__nv_bfloat16, false, kForwardPacks>(call, stream);
  }
  return HEADRACE_LAUNCH_STATUS();
}

int residual_norm_backward_cuda(const ResidualNormBackward& call, void* stream) {
  if (call.dtype == Dtype::float32) {
    call.layer_norm ? launch_kind<float, true, kBackwardPacks<kPackSize<float>>>(call, stream)
                    : launch_kind<float, false, kBackwardPacks<kPackSize<float>>>(call, stream);
  } else {
    call.layer_norm ? launch_kind<__nv_bfloat16, true, kBackwardPacks<kPackSize<__nv_bfloat16>>>(call, stream)
                    : launch_kind<__nv_bfloat16, false, kBackwardPacks<kPackSize<__nv_bfloat16>>>(call, stream);
  }
  if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  call.weight_dtype == Dtype::float32 ? launch_sums<float>(call, stream) : launch_sums<__nv_bfloat16>(call, stream);
  return HEADRACE_LAUNCH_STATUS();
}

}  // namespace headrace
