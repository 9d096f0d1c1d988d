// GeGLU on the CPU: loops that the compiler turns into vector instructions. Mathematics and layout: geglu.h.
#include "geglu.h"

#include "gated_cpu.h"
#include "gelu_numbers.h"

namespace headrace {
namespace {

struct VectorExp {
  HEADRACE_INLINE float operator()(float x) const { return exp(x); }
};

template <typename Gelu>
struct GeGlu {
  HEADRACE_INLINE static float forward(float gate, float up) { return gate * Gelu::factor(gate, VectorExp()) * up; }
  HEADRACE_INLINE static GateAndUp backward(float grad, float gate, float up) {
    const FactorAndSlope gelu = Gelu::factor_and_slope(gate, VectorExp());
    return {grad * up * gelu.slope, grad * (gate * gelu.factor)};
  }
};

#define HEADRACE_GEGLU(name, T, Gelu)                                                                                \
  HEADRACE_FOR_EVERY_CPU void forward_##name(const void* gate_up, void* hidden, int64_t width, int64_t begin,        \
                                             int64_t end) {                                                          \
    gated_forward<GeGlu<Gelu>, T>(gate_up, hidden, width, begin, end);                                               \
  }                                                                                                                  \
  HEADRACE_FOR_EVERY_CPU void backward_##name(const void* grad, const void* gate_up, void* grad_gate_up,             \
                                              int64_t width, int64_t begin, int64_t end) {                           \
    gated_backward<GeGlu<Gelu>, T>(grad, gate_up, grad_gate_up, width, begin, end);                                  \
  }

HEADRACE_GEGLU(exact_float32, float, ExactGelu)
HEADRACE_GEGLU(exact_bfloat16, BFloat16, ExactGelu)
HEADRACE_GEGLU(tanh_float32, float, TanhGelu)
HEADRACE_GEGLU(tanh_bfloat16, BFloat16, TanhGelu)

}  // namespace

void geglu_forward_cpu(Dtype dtype, bool tanh, const void* gate_up, void* hidden, int64_t width, int64_t begin,
                       int64_t end) {
  const auto run = dtype == Dtype::float32 ? (tanh ? forward_tanh_float32 : forward_exact_float32)
                                           : (tanh ? forward_tanh_bfloat16 : forward_exact_bfloat16);
  run(gate_up, hidden, width, begin, end);
}

void geglu_backward_cpu(Dtype dtype, bool tanh, const void* grad, const void* gate_up, void* grad_gate_up,
                        int64_t width, int64_t begin, int64_t end) {
  const auto run = dtype == Dtype::float32 ? (tanh ? backward_tanh_float32 : backward_exact_float32)
                                           : (tanh ? backward_tanh_bfloat16 : backward_exact_bfloat16);
  run(grad, gate_up, grad_gate_up, width, begin, end);
}

}  // namespace headrace
