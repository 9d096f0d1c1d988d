// Residual addition and norm on the CPU: loops that the compiler turns into vector instructions. Mathematics and layout:
// residual_norm.h.
//
// A row stays in the cache while several loops go over it, which is next to nothing beside fetching it from memory.
#include "residual_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_numbers.h"

namespace headrace {
namespace {

// Weights in fp32, whatever they are kept in: half as many loops to compile, for a copy that is read for many rows.
class FloatRow {
 public:
  FloatRow(Dtype dtype, const void* numbers, int64_t count) : numbers_(static_cast<const float*>(numbers)) {
    if (dtype == Dtype::float32 || numbers == nullptr) return;
    copy_.resize(static_cast<size_t>(count));
    const auto* narrow = static_cast<const BFloat16*>(numbers);
    for (int64_t i = 0; i < count; ++i) copy_[static_cast<size_t>(i)] = load(narrow[i]);
    numbers_ = copy_.data();
  }
  FloatRow(const FloatRow&) = delete;
  FloatRow& operator=(const FloatRow&) = delete;

  const float* numbers() const { return numbers_; }

 private:
  std::vector<float> copy_;
  const float* numbers_;
};

// Adds a row, and gives the sum (LayerNorm) or the sum of squares (RMSNorm) of what is stored: the first pass over a row
// has all of its cache misses, and time for these. 64 running sums, in an order that vectors keep.
template <typename T, bool kLayerNorm>
HEADRACE_INLINE float add_row(const T* __restrict x, const T* __restrict residual, T* __restrict stream,
                              int64_t width) {
  constexpr int kLanes = 64;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) {
      T sum;
      store(sum, load(x[i + lane]) + load(residual[i + lane]));
      stream[i + lane] = sum;
      lanes[lane] += kLayerNorm ? load(sum) : load(sum) * load(sum);
    }
  }
  for (int lane = 0; i < width; ++i, ++lane) {
    store(stream[i], load(x[i]) + load(residual[i]));
    lanes[lane] += kLayerNorm ? load(stream[i]) : load(stream[i]) * load(stream[i]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <typename T, bool kLayerNorm>
HEADRACE_INLINE void norm_row(const T* __restrict stream, const float* __restrict weight, const float* __restrict bias,
                              T* __restrict normalised, int64_t width, float mean, float rstd) {
  for (int64_t i = 0; i < width; ++i) {
    if constexpr (kLayerNorm) {
      store(normalised[i], (load(stream[i]) - mean) * rstd * weight[i] + bias[i]);
    } else {
      store(normalised[i], load(stream[i]) * rstd * weight[i]);
    }
  }
}

template <typename T, bool kLayerNorm>
HEADRACE_INLINE void forward_rows(const ResidualNormForward& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const auto count = static_cast<float>(width);
  const FloatRow weights(call.weight_dtype, call.weight, width), biases(call.weight_dtype, call.bias, width);
  const float *weight = weights.numbers(), *bias = biases.numbers();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * width;
    const T* stream = static_cast<const T*>(call.x) + at;
    float first;
    if (call.residual != nullptr) {
      T* sums = static_cast<T*>(call.stream) + at;
      first = add_row<T, kLayerNorm>(stream, static_cast<const T*>(call.residual) + at, sums, width);
      stream = sums;
    } else {
      first = sum(width, [=](int64_t i) HEADRACE_INLINE_LAMBDA {
        return kLayerNorm ? load(stream[i]) : load(stream[i]) * load(stream[i]);
      });
    }
    float mean = 0.0f, squares = first;
    if constexpr (kLayerNorm) {
      call.mean[row] = mean = first / count;
      // Around the mean: mean(x^2) - mean^2 would lose digits.
      squares = sum(width, [=](int64_t i) HEADRACE_INLINE_LAMBDA {
        const float x = load(stream[i]) - mean;
        return x * x;
      });
    }
    const float rstd = 1.0f / std::sqrt(squares / count + call.eps);
    call.rstd[row] = rstd;
    call.square_sum[row] = kLayerNorm ? squares + mean * mean * count : squares;
    norm_row<T, kLayerNorm>(stream, weight, bias, static_cast<T*>(call.normalised) + at, width, mean, rstd);
  }
}

// The row's share in grad_weight and grad_bias.
template <typename T, bool kLayerNorm>
HEADRACE_INLINE void weight_row(const T* __restrict upstream, const T* __restrict stream, float* __restrict grad_weight,
                                float* __restrict grad_bias, int64_t width, float mean, float rstd) {
  for (int64_t i = 0; i < width; ++i) {
    const float n = load(upstream[i]), x = load(stream[i]);
    if constexpr (kLayerNorm) {
      grad_weight[i] += n * ((x - mean) * rstd);
      grad_bias[i] += n;
    } else {
      grad_weight[i] += n * (x * rstd);
    }
  }
}

template <typename T, bool kLayerNorm, bool kGradStream>
HEADRACE_INLINE void stream_row(const T* __restrict upstream, const T* __restrict grad_stream,
                                const T* __restrict stream, const float* __restrict weight, T* __restrict grad,
                                int64_t width, float mean, float rstd, float slope, float level) {
  for (int64_t i = 0; i < width; ++i) {
    const float x = kLayerNorm ? load(stream[i]) - mean : load(stream[i]);
    float through = load(upstream[i]) * weight[i] - x * rstd * slope;
    if constexpr (kLayerNorm) through -= level;
    through *= rstd;
    store(grad[i], kGradStream ? load(grad_stream[i]) + through : through);
  }
}

template <typename T, bool kLayerNorm>
HEADRACE_INLINE void backward_row(const ResidualNormBackward& call, const float* weight, int64_t row,
                                  float* grad_weight, float* grad_bias) {
  const int64_t width = call.width, at = row * width;
  const T *upstream = static_cast<const T*>(call.grad_normalised) + at, *stream = static_cast<const T*>(call.stream) + at;
  T* grad = static_cast<T*>(call.grad) + at;
  const float rstd = call.rstd[row], mean = kLayerNorm ? call.mean[row] : 0.0f;

  weight_row<T, kLayerNorm>(upstream, stream, grad_weight, grad_bias, width, mean, rstd);
  const float slope = sum(width, [=](int64_t i) HEADRACE_INLINE_LAMBDA {
    const float x = kLayerNorm ? load(stream[i]) - mean : load(stream[i]);
    return load(upstream[i]) * weight[i] * (x * rstd);
  }) / static_cast<float>(width);
  float level = 0.0f;
  if constexpr (kLayerNorm) {
    level = sum(width, [=](int64_t i) HEADRACE_INLINE_LAMBDA { return load(upstream[i]) * weight[i]; }) /
            static_cast<float>(width);
  }
  if (call.grad_stream != nullptr) {
    const T* grad_stream = static_cast<const T*>(call.grad_stream) + at;
    stream_row<T, kLayerNorm, true>(upstream, grad_stream, stream, weight, grad, width, mean, rstd, slope, level);
  } else {
    stream_row<T, kLayerNorm, false>(upstream, nullptr, stream, weight, grad, width, mean, rstd, slope, level);
  }
}

int64_t rows_in_group(int64_t rows) {
  // At most 64 groups: as many threads may work at them, and their sums are small beside the rows themselves.
  return std::max<int64_t>(32, (rows + 63) / 64);
}

template <typename T, bool kLayerNorm>
HEADRACE_INLINE void backward_groups(const ResidualNormBackward& call, int64_t begin, int64_t end) {
  const int64_t each = rows_in_group(call.rows), width = call.width;
  const FloatRow weights(call.weight_dtype, call.weight, width);
  for (int64_t group = begin; group < end; ++group) {
    float* grad_weight = call.partial_sums + group * width;
    float* grad_bias = kLayerNorm ? grad_weight + call.groups * width : nullptr;
    std::fill_n(grad_weight, width, 0.0f);
    if constexpr (kLayerNorm) std::fill_n(grad_bias, width, 0.0f);
    const int64_t last = std::min(call.rows, (group + 1) * each);
    for (int64_t row = group * each; row < last; ++row)
      backward_row<T, kLayerNorm>(call, weights.numbers(), row, grad_weight, grad_bias);
  }
}

template <typename W>
void sum_groups(const float* partial_sums, void* total, int64_t groups, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 256;  // sums at a time that stay in the cache
  W* out = static_cast<W*>(total);
  for (int64_t at = begin; at < end; at += kColumns) {
    float sums[kColumns] = {};
    const int64_t count = std::min(kColumns, end - at);
    for (int64_t group = 0; group < groups; ++group) {
      const float* row = partial_sums + group * width + at;
      for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
    }
    for (int64_t i = 0; i < count; ++i) store(out[at + i], sums[i]);
  }
}

HEADRACE_FOR_EVERY_CPU
void forward(const ResidualNormForward& call, int64_t begin, int64_t end) {
  if (call.dtype == Dtype::float32) {
    call.layer_norm ? forward_rows<float, true>(call, begin, end) : forward_rows<float, false>(call, begin, end);
  } else {
    call.layer_norm ? forward_rows<BFloat16, true>(call, begin, end) : forward_rows<BFloat16, false>(call, begin, end);
  }
}

HEADRACE_FOR_EVERY_CPU
void backward(const ResidualNormBackward& call, int64_t begin, int64_t end) {
  if (call.dtype == Dtype::float32) {
    call.layer_norm ? backward_groups<float, true>(call, begin, end) : backward_groups<float, false>(call, begin, end);
  } else {
    call.layer_norm ? backward_groups<BFloat16, true>(call, begin, end)
                    : backward_groups<BFloat16, false>(call, begin, end);
  }
}

}  // namespace

void residual_norm_forward_cpu(const ResidualNormForward& call, int64_t begin, int64_t end) {
  forward(call, begin, end);
}

int64_t residual_norm_groups_cpu(int64_t rows) { return (rows + rows_in_group(rows) - 1) / rows_in_group(rows); }

void residual_norm_backward_cpu(const ResidualNormBackward& call, int64_t begin, int64_t end) {
  backward(call, begin, end);
}

void residual_norm_sum_groups_cpu(const ResidualNormBackward& call, int64_t begin, int64_t end) {
  const auto sum = call.weight_dtype == Dtype::float32 ? sum_groups<float> : sum_groups<BFloat16>;
  sum(call.partial_sums, call.grad_weight, call.groups, call.width, begin, end);
  if (call.layer_norm)
    sum(call.partial_sums + call.groups * call.width, call.grad_bias, call.groups, call.width, begin, end);
}

}  // namespace headrace
