// GeGLU on the GPU. Mathematics and layout: geglu.h.
#include "geglu.h"

#include "gated.cuh"
#include "gelu_numbers.h"

namespace headrace {
namespace {

struct DeviceExp {
  __device__ __forceinline__ float operator()(float x) const { return expf(x); }
};

template <typename Gelu>
struct GeGlu {
  __device__ __forceinline__ static float forward(float gate, float up) {
    return gate * Gelu::factor(gate, DeviceExp()) * up;
  }
  __device__ __forceinline__ static GateAndUp backward(float grad, float gate, float up) {
    const FactorAndSlope gelu = Gelu::factor_and_slope(gate, DeviceExp());
    return {grad * up * gelu.slope, grad * (gate * gelu.factor)};
  }
};

}  // namespace

int geglu_forward_cuda(Dtype dtype, bool tanh, const void* gate_up, void* hidden, int64_t rows, int64_t width,
                       void* stream) {
  const auto run = tanh ? gated_forward<GeGlu<TanhGelu>> : gated_forward<GeGlu<ExactGelu>>;
  return run(dtype, gate_up, hidden, rows, width, stream);
}

int geglu_backward_cuda(Dtype dtype, bool tanh, const void* grad, const void* gate_up, void* grad_gate_up,
                        int64_t rows, int64_t width, void* stream) {
  const auto run = tanh ? gated_backward<GeGlu<TanhGelu>> : gated_backward<GeGlu<ExactGelu>>;
  return run(dtype, grad, gate_up, grad_gate_up, rows, width, stream);
}

}  // namespace headrace
