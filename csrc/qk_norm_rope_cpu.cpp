// Norm and rotary embedding of queries and keys on the CPU: loops that the compiler turns into vector instructions.
// Mathematics and layout: qk_norm_rope.h.
#include "qk_norm_rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_numbers.h"

namespace headrace {
namespace {

template <typename T>
HEADRACE_INLINE void load_row(const T* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

HEADRACE_INLINE float sum_of_products(const float* __restrict x, const float* __restrict y, int64_t count) {
  return sum(count, [&](int64_t i) HEADRACE_INLINE_LAMBDA { return x[i] * y[i]; });
}

// Rows of fp32 numbers that one thread works with.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t head_size) : size_(head_size), numbers_(rows * size_) {}
  float* row(int64_t index) { return numbers_.data() + index * size_; }

 private:
  int64_t size_;
  std::vector<float> numbers_;
};

int64_t position_of(const QkInput& input, int64_t token) {
  return input.positions_are_int64 ? static_cast<const int64_t*>(input.positions)[token]
                                   : static_cast<const int32_t*>(input.positions)[token];
}

template <typename T>
HEADRACE_INLINE void load_angles(const QkInput& input, int64_t token, float* cos, float* sin) {
  const int64_t half = input.shape.head_size / 2, at = position_of(input, token) * half;
  load_row(static_cast<const T*>(input.cos) + at, cos, half);
  load_row(static_cast<const T*>(input.sin) + at, sin, half);
}

template <typename T>
HEADRACE_INLINE void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
                            T* __restrict out, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    store(out[i], a * cos[i] - b * sin[i]);
    store(out[i + half], b * cos[i] + a * sin[i]);
  }
}

template <typename T>
HEADRACE_INLINE void rotate_back(const T* __restrict x, const float* __restrict cos, const float* __restrict sin,
                                 float* __restrict out, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(x[i]), b = load(x[i + half]);
    out[i] = a * cos[i] + b * sin[i];
    out[i + half] = b * cos[i] - a * sin[i];
  }
}

// One head: normalised in x (scratch), then rotated into `out`.
template <typename T>
HEADRACE_INLINE void head_forward(const T* __restrict in, T* __restrict out, float* __restrict x,
                                  const float* __restrict weight, const float* __restrict bias,
                                  const float* __restrict cos, const float* __restrict sin, float* __restrict statistics,
                                  int kind, int64_t size, float eps) {
  load_row(in, x, size);
  if (kind == 2) {
    const float mean = sum(size, [&](int64_t i) HEADRACE_INLINE_LAMBDA { return x[i]; }) / static_cast<float>(size);
    for (int64_t i = 0; i < size; ++i) x[i] -= mean;
    *statistics++ = mean;
  }
  if (kind > 0) {
    const float scale = 1.0f / std::sqrt(sum_of_products(x, x, size) / static_cast<float>(size) + eps);
    *statistics = scale;
    if (kind == 2) {
      for (int64_t i = 0; i < size; ++i) x[i] = x[i] * scale * weight[i] + bias[i];
    } else {
      for (int64_t i = 0; i < size; ++i) x[i] = x[i] * scale * weight[i];
    }
  }
  rotate(x, cos, sin, out, size / 2);
}

template <typename T>
HEADRACE_INLINE void forward(const QkForward& pass, int64_t begin, int64_t end) {
  const QkInput& input = pass.input;
  const auto [tokens, groups, queries, size] = input.shape;
  const int kind = input.statistics_per_head;
  Scratch scratch(8, size);
  float *x = scratch.row(0), *cos = scratch.row(1), *sin = scratch.row(2);
  float *weights[2] = {scratch.row(3), scratch.row(4)}, *biases[2] = {scratch.row(5), scratch.row(6)};
  float* rounded = scratch.row(7);
  if (kind > 0) {
    load_row(static_cast<const T*>(input.query_weight), weights[0], size);
    load_row(static_cast<const T*>(input.key_weight), weights[1], size);
  }
  if (kind == 2) {
    load_row(static_cast<const T*>(input.query_bias), biases[0], size);
    load_row(static_cast<const T*>(input.key_bias), biases[1], size);
  }
  for (int64_t token = begin; token < end; ++token) {
    load_angles<T>(input, token, cos, sin);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = token * groups + group;
      const T* in = static_cast<const T*>(input.qkv) + at * (queries + 2) * size;
      T* query = static_cast<T*>(pass.query) + at * queries * size;
      T* key = static_cast<T*>(pass.key) + at * size;
      for (int64_t head = 0; head <= queries; ++head) {
        const int64_t numbered = at * (queries + 1) + head;
        const bool is_key = head == queries;
        T* out = is_key ? key : query + head * size;
        head_forward(in + head * size, out, x, weights[is_key], biases[is_key], cos, sin,
                     pass.statistics + numbered * kind, kind, size, pass.eps);
        if (pass.lengths != nullptr) {
          load_row(out, rounded, size);
          pass.lengths[numbered] = std::sqrt(sum_of_products(rounded, rounded, size));
        }
      }
    }
  }
}

// One head: the gradient of its rotated form to that of its input; adds to the weight's and the bias's.
template <typename T>
HEADRACE_INLINE void head_backward(const T* __restrict grad, const T* __restrict in, T* __restrict grad_in,
                                   float* __restrict turned, float* __restrict x, const float* __restrict weight,
                                   const float* __restrict cos, const float* __restrict sin,
                                   const float* __restrict statistics, float* __restrict grad_weight,
                                   float* __restrict grad_bias, int kind, int64_t size) {
  rotate_back(grad, cos, sin, turned, size / 2);
  if (kind == 0) {
    for (int64_t i = 0; i < size; ++i) store(grad_in[i], turned[i]);
    return;
  }
  const float mean = kind == 2 ? statistics[0] : 0.0f, scale = statistics[kind - 1];
  for (int64_t i = 0; i < size; ++i) x[i] = (load(in[i]) - mean) * scale;
  if (kind == 2)
    for (int64_t i = 0; i < size; ++i) grad_bias[i] += turned[i];
  for (int64_t i = 0; i < size; ++i) {
    grad_weight[i] += turned[i] * x[i];
    turned[i] *= weight[i];
  }
  const float shift = kind == 2 ? sum(size, [&](int64_t i) HEADRACE_INLINE_LAMBDA { return turned[i]; }) / static_cast<float>(size) : 0.0f;
  const float along = sum_of_products(turned, x, size) / static_cast<float>(size);
  for (int64_t i = 0; i < size; ++i) store(grad_in[i], scale * (turned[i] - shift - x[i] * along));
}

template <typename T>
HEADRACE_INLINE void backward(const QkBackward& pass, int64_t begin, int64_t end) {
  const QkInput& input = pass.input;
  const auto [tokens, groups, queries, size] = input.shape;
  const int kind = input.statistics_per_head;
  Scratch scratch(10, size);
  float *x = scratch.row(0), *cos = scratch.row(1), *sin = scratch.row(2), *turned = scratch.row(3);
  float* weights[2] = {scratch.row(4), scratch.row(5)};
  float *grad_weights[2] = {scratch.row(6), scratch.row(7)}, *grad_biases[2] = {scratch.row(8), scratch.row(9)};
  if (kind > 0) {
    load_row(static_cast<const T*>(input.query_weight), weights[0], size);
    load_row(static_cast<const T*>(input.key_weight), weights[1], size);
  }
  for (int64_t part = begin; part < end; ++part) {
    std::fill(scratch.row(6), scratch.row(9) + size, 0.0f);
    const int64_t last = std::min(tokens, (part + 1) * kQkTokensOfPart);
    for (int64_t token = part * kQkTokensOfPart; token < last; ++token) {
      load_angles<T>(input, token, cos, sin);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t at = token * groups + group;
        const T* in = static_cast<const T*>(input.qkv) + at * (queries + 2) * size;
        T* out = static_cast<T*>(pass.grad_qkv) + at * (queries + 2) * size;
        const T* grad_query = static_cast<const T*>(pass.grad_query) + at * queries * size;
        const T* grad_key = static_cast<const T*>(pass.grad_key) + at * size;
        for (int64_t head = 0; head <= queries; ++head) {
          const bool is_key = head == queries;
          head_backward(is_key ? grad_key : grad_query + head * size, in + head * size, out + head * size, turned, x,
                        weights[is_key], cos, sin, pass.statistics + (at * (queries + 1) + head) * kind,
                        grad_weights[is_key], grad_biases[is_key], kind, size);
        }
        std::memcpy(out + (queries + 1) * size, static_cast<const T*>(pass.grad_value) + at * size, size * sizeof(T));
      }
    }
    float* sums = pass.partials + part * 2 * kind * size;
    for (int which = 0; which < 2 && kind > 0; ++which) {
      std::copy_n(grad_weights[which], size, sums + which * kind * size);
      if (kind == 2) std::copy_n(grad_biases[which], size, sums + (which * kind + 1) * size);
    }
  }
}

HEADRACE_FOR_EVERY_CPU
void forward_float32(const QkForward& pass, int64_t begin, int64_t end) { forward<float>(pass, begin, end); }

HEADRACE_FOR_EVERY_CPU
void forward_bfloat16(const QkForward& pass, int64_t begin, int64_t end) { forward<BFloat16>(pass, begin, end); }

HEADRACE_FOR_EVERY_CPU
void backward_float32(const QkBackward& pass, int64_t begin, int64_t end) { backward<float>(pass, begin, end); }

HEADRACE_FOR_EVERY_CPU
void backward_bfloat16(const QkBackward& pass, int64_t begin, int64_t end) { backward<BFloat16>(pass, begin, end); }

}  // namespace

void qk_norm_rope_forward_cpu(const QkForward& pass, int64_t begin, int64_t end) {
  const auto run = pass.input.dtype == Dtype::float32 ? forward_float32 : forward_bfloat16;
  run(pass, begin, end);
}

void qk_norm_rope_backward_cpu(const QkBackward& pass, int64_t begin, int64_t end) {
  const auto run = pass.input.dtype == Dtype::float32 ? backward_float32 : backward_bfloat16;
  run(pass, begin, end);
}

void qk_norm_rope_sum_parts_cpu(const QkBackward& pass, int64_t parts) {
  const int64_t count = 2 * pass.input.statistics_per_head * pass.input.shape.head_size;
  std::vector<double> sums(count, 0.0);  // fp32 would lose 1e-6 of them over 1,000 parts
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) sums[i] += pass.partials[part * count + i];
  for (int64_t i = 0; i < count; ++i) pass.grad_weights[i] = static_cast<float>(sums[i]);
}

}  // namespace headrace
