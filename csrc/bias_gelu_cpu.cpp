// Bias and GELU on the CPU: loops that the compiler turns into vector instructions. Mathematics and layout: bias_gelu.h.
#include "bias_gelu.h"

#include <algorithm>

#include "cpu_numbers.h"
#include "gelu_numbers.h"

namespace headrace {
namespace {

struct VectorExp {
  HEADRACE_INLINE float operator()(float x) const { return exp(x); }
};

template <typename T, typename Gelu>
HEADRACE_INLINE void forward(const void* input, const void* bias, void* hidden, int64_t width, int64_t begin,
                             int64_t end) {
  while (begin < end) {
    const int64_t column = begin % width, count = std::min(end - begin, width - column);
    const T* __restrict in = static_cast<const T*>(input) + begin;
    const T* __restrict add = static_cast<const T*>(bias) + column;
    T* __restrict out = static_cast<T*>(hidden) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const float z = load(in[i]) + load(add[i]);
      store(out[i], z * Gelu::factor(z, VectorExp()));
    }
    begin += count;
  }
}

template <typename T, typename Gelu>
HEADRACE_INLINE void backward(const void* grad, const void* input, const void* bias, void* grad_input, float* partial,
                              int64_t rows, int64_t width, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* __restrict sums = partial + chunk * width;
    std::fill(sums, sums + width, 0.0f);
    const int64_t last = std::min(rows, (chunk + 1) * kBiasGeluRows);
    for (int64_t row = chunk * kBiasGeluRows; row < last; ++row) {
      const T* __restrict upstream = static_cast<const T*>(grad) + row * width;
      const T* __restrict in = static_cast<const T*>(input) + row * width;
      const T* __restrict add = static_cast<const T*>(bias);
      T* __restrict out = static_cast<T*>(grad_input) + row * width;
      for (int64_t i = 0; i < width; ++i) {
        const float z = load(in[i]) + load(add[i]);
        const float g = load(upstream[i]) * Gelu::factor_and_slope(z, VectorExp()).slope;
        store(out[i], g);
        sums[i] += g;
      }
    }
  }
}

template <typename T>
HEADRACE_INLINE void sum(const float* partial, void* grad_bias, int64_t chunks, int64_t width, int64_t begin,
                         int64_t end) {
  constexpr int64_t kStrip = 64;  // columns whose sums stay in registers or the nearest cache
  for (; begin < end; begin += kStrip) {
    const int64_t count = std::min(kStrip, end - begin);
    float sums[kStrip] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < count; ++i) sums[i] += partial[chunk * width + begin + i];
    for (int64_t i = 0; i < count; ++i) store(static_cast<T*>(grad_bias)[begin + i], sums[i]);
  }
}

#define HEADRACE_BIAS_GELU(name, T, Gelu)                                                                            \
  HEADRACE_FOR_EVERY_CPU void forward_##name(const void* input, const void* bias, void* hidden, int64_t width,       \
                                             int64_t begin, int64_t end) {                                           \
    forward<T, Gelu>(input, bias, hidden, width, begin, end);                                                        \
  }                                                                                                                  \
  HEADRACE_FOR_EVERY_CPU void backward_##name(const void* grad, const void* input, const void* bias,                 \
                                              void* grad_input, float* partial, int64_t rows, int64_t width,         \
                                              int64_t begin, int64_t end) {                                          \
    backward<T, Gelu>(grad, input, bias, grad_input, partial, rows, width, begin, end);                              \
  }

HEADRACE_BIAS_GELU(exact_float32, float, ExactGelu)
HEADRACE_BIAS_GELU(exact_bfloat16, BFloat16, ExactGelu)
HEADRACE_BIAS_GELU(tanh_float32, float, TanhGelu)
HEADRACE_BIAS_GELU(tanh_bfloat16, BFloat16, TanhGelu)

HEADRACE_FOR_EVERY_CPU
void sum_float32(const float* partial, void* grad_bias, int64_t chunks, int64_t width, int64_t begin, int64_t end) {
  sum<float>(partial, grad_bias, chunks, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void sum_bfloat16(const float* partial, void* grad_bias, int64_t chunks, int64_t width, int64_t begin, int64_t end) {
  sum<BFloat16>(partial, grad_bias, chunks, width, begin, end);
}

}  // namespace

void bias_gelu_forward_cpu(Dtype dtype, bool tanh, const void* input, const void* bias, void* hidden, int64_t width,
                           int64_t begin, int64_t end) {
  const auto run = dtype == Dtype::float32 ? (tanh ? forward_tanh_float32 : forward_exact_float32)
                                           : (tanh ? forward_tanh_bfloat16 : forward_exact_bfloat16);
  run(input, bias, hidden, width, begin, end);
}

void bias_gelu_backward_cpu(Dtype dtype, bool tanh, const void* grad, const void* input, const void* bias,
                            void* grad_input, float* partial, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  const auto run = dtype == Dtype::float32 ? (tanh ? backward_tanh_float32 : backward_exact_float32)
                                           : (tanh ? backward_tanh_bfloat16 : backward_exact_bfloat16);
  run(grad, input, bias, grad_input, partial, rows, width, begin, end);
}

void bias_gelu_sum_cpu(Dtype dtype, const float* partial, void* grad_bias, int64_t chunks, int64_t width, int64_t begin,
                       int64_t end) {
  const auto run = dtype == Dtype::float32 ? sum_float32 : sum_bfloat16;
  run(partial, grad_bias, chunks, width, begin, end);
}

}  // namespace headrace
