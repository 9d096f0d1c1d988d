// SwiGLU on the CPU: loops that the compiler turns into vector instructions. Mathematics and layout: swiglu.h.
#include "swiglu.h"

#include "gated_cpu.h"

namespace headrace {
namespace {

struct SwiGlu {
  HEADRACE_INLINE static float forward(float gate, float up) { return gate / (1.0f + exp(-gate)) * up; }
  HEADRACE_INLINE static GateAndUp backward(float grad, float gate, float up) {
    const float one_plus_exp = 1.0f + exp(-gate);
    const float sigmoid = 1.0f / one_plus_exp;
    // In torch's order, so that infinities meet zeros (NaN) where they do there.
    return {grad * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), grad * (gate / one_plus_exp)};
  }
};

HEADRACE_FOR_EVERY_CPU
void forward_float32(const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  gated_forward<SwiGlu, float>(gate_up, hidden, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void forward_bfloat16(const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end) {
  gated_forward<SwiGlu, BFloat16>(gate_up, hidden, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void backward_float32(const void* grad, const void* gate_up, void* grad_gate_up, int64_t width, int64_t begin,
                      int64_t end) {
  gated_backward<SwiGlu, float>(grad, gate_up, grad_gate_up, width, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void backward_bfloat16(const void* grad, const void* gate_up, void* grad_gate_up, int64_t width, int64_t begin,
                       int64_t end) {
  gated_backward<SwiGlu, BFloat16>(grad, gate_up, grad_gate_up, width, begin, end);
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
