// SwiGLU on the GPU. Mathematics and layout: swiglu.h.
#include "swiglu.h"

#include "gated.cuh"

namespace headrace {
namespace {

struct SwiGlu {
  __device__ __forceinline__ static float forward(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }
  __device__ __forceinline__ static GateAndUp backward(float grad, float gate, float up) {
    const float one_plus_exp = 1.0f + expf(-gate), sigmoid = 1.0f / one_plus_exp;
    // In torch's order, so that infinities meet zeros (NaN) where they do there.
    return {grad * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), grad * (gate / one_plus_exp)};
  }
};

}  // namespace

int swiglu_forward_cuda(Dtype dtype, const void* gate_up, void* hidden, int64_t rows, int64_t width, void* stream) {
  return gated_forward<SwiGlu>(dtype, gate_up, hidden, rows, width, stream);
}

int swiglu_backward_cuda(Dtype dtype, const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows,
                         int64_t width, void* stream) {
  return gated_backward<SwiGlu>(dtype, grad, gate_up, grad_gate_up, rows, width, stream);
}

}  // namespace headrace
