// For CPU kernels of gated activations, hidden = f(gate) * up: the walk over rows whose halves are gate and up.
//
//   struct SwiGlu {
//     HEADRACE_INLINE static float forward(float gate, float up);                           // hidden
//     HEADRACE_INLINE static GateAndUp backward(float grad, float gate, float up);          // their gradients
//   };
//   gated_forward<SwiGlu, float>(gate_up, hidden, width, begin, end);
//
// begin and end count numbers of hidden, so that callers can divide the work as they like.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_numbers.h"

namespace headrace {
namespace {

struct GateAndUp {
  float gate, up;
};

// The part of one row that is in [begin, end): `at` in hidden and grad, `gate` in gate_up and its gradient.
struct Segment {
  int64_t at, gate, count;
};

HEADRACE_INLINE Segment first_segment(int64_t width, int64_t begin, int64_t end) {
  const int64_t row = begin / width;
  return {begin, begin + row * width, std::min(end, (row + 1) * width) - begin};
}

template <typename Activation, typename T>
HEADRACE_INLINE void gated_forward(const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  while (begin < end) {
    const Segment part = first_segment(width, begin, end);
    const T* __restrict gate = static_cast<const T*>(gate_up) + part.gate;
    const T* __restrict up = gate + width;
    T* __restrict out = static_cast<T*>(hidden) + part.at;
    for (int64_t i = 0; i < part.count; ++i) store(out[i], Activation::forward(load(gate[i]), load(up[i])));
    begin += part.count;
  }
}

template <typename Activation, typename T>
HEADRACE_INLINE void gated_backward(const void* grad, const void* gate_up, void* grad_gate_up, int64_t width,
                                    int64_t begin, int64_t end) {
  while (begin < end) {
    const Segment part = first_segment(width, begin, end);
    const T* __restrict upstream = static_cast<const T*>(grad) + part.at;
    const T* __restrict gate = static_cast<const T*>(gate_up) + part.gate;
    const T* __restrict up = gate + width;
    T* __restrict grad_gate = static_cast<T*>(grad_gate_up) + part.gate;
    T* __restrict grad_up = grad_gate + width;
    for (int64_t i = 0; i < part.count; ++i) {
      const GateAndUp grads = Activation::backward(load(upstream[i]), load(gate[i]), load(up[i]));
      store(grad_gate[i], grads.gate);
      store(grad_up[i], grads.up);
    }
    begin += part.count;
  }
}

}  // namespace
}  // namespace headrace
