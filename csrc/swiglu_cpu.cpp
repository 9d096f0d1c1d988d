// SwiGLU on the CPU: loops that the compiler turns into vector instructions. Mathematics and layout: swiglu.h.
#include "swiglu.h"

#include <algorithm>

#include "cpu_numbers.h"

namespace headrace {
namespace {

template <typename T>
HEADRACE_INLINE void forward_row(const T* __restrict gate, const T* __restrict up, T* __restrict hidden,
                                 int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = load(gate[i]);
    store(hidden[i], g / (1.0f + exp(-g)) * load(up[i]));
  }
}

template <typename T>
HEADRACE_INLINE void backward_row(const T* __restrict grad, const T* __restrict gate, const T* __restrict up,
                                  T* __restrict grad_gate, T* __restrict grad_up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float d = load(grad[i]), g = load(gate[i]);
    const float one_plus_exp = 1.0f + exp(-g);
    const float sigmoid = 1.0f / one_plus_exp;
    // In torch's order, so that infinities meet zeros (NaN) where they do there.
    store(grad_gate[i], d * load(up[i]) * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    store(grad_up[i], d * (g / one_plus_exp));
  }
}

// The part of one row that is in [begin, end): `at` in hidden and grad, `gate` in gate_up and its gradient.
struct Segment {
  int64_t at, gate, count;
};

HEADRACE_INLINE Segment first_segment(int64_t width, int64_t begin, int64_t end) {
  const int64_t row = begin / width;
  return {begin, begin + row * width, std::min(end, (row + 1) * width) - begin};
}

template <typename T>
HEADRACE_INLINE void forward(const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  while (begin < end) {
    const Segment part = first_segment(width, begin, end);
    const T* gate = static_cast<const T*>(gate_up) + part.gate;
    forward_row(gate, gate + width, static_cast<T*>(hidden) + part.at, part.count);
    begin += part.count;
  }
}

template <typename T>
HEADRACE_INLINE void backward(const void* grad, const void* gate_up, void* grad_gate_up, int64_t width, int64_t begin,
                              int64_t end) {
  while (begin < end) {
    const Segment part = first_segment(width, begin, end);
    const T* gate = static_cast<const T*>(gate_up) + part.gate;
    T* grad_gate = static_cast<T*>(grad_gate_up) + part.gate;
    backward_row(static_cast<const T*>(grad) + part.at, gate, gate + width, grad_gate, grad_gate + width, part.count);
    begin += part.count;
  }
}

HEADRACE_FOR_EVERY_CPU
void forward_float32(const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  forward<float>(gate_up, hidden, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void forward_bfloat16(const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  forward<BFloat16>(gate_up, hidden, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void backward_float32(const void* grad, const void* gate_up, void* grad_gate_up, int64_t width, int64_t begin,
                      int64_t end) {
  backward<float>(grad, gate_up, grad_gate_up, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void backward_bfloat16(const void* grad, const void* gate_up, void* grad_gate_up, int64_t width, int64_t begin,
                       int64_t end) {
  backward<BFloat16>(grad, gate_up, grad_gate_up, width, begin, end);
}

}  // namespace

void swiglu_forward_cpu(Dtype dtype, const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  const auto run = dtype == Dtype::float32 ? forward_float32 : forward_bfloat16;
  run(gate_up, hidden, width, begin, end);
}

void swiglu_backward_cpu(Dtype dtype, const void* grad, const void* gate_up, void* grad_gate_up, int64_t width,
                         int64_t begin, int64_t end) {
  const auto run = dtype == Dtype::float32 ? backward_float32 : backward_bfloat16;
  run(grad, gate_up, grad_gate_up, width, begin, end);
}

}  // namespace headrace
