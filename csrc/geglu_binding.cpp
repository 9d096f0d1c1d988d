// Operators headrace::geglu_forward and headrace::geglu_backward. Mathematics and layout: geglu.h.
#include "geglu.h"

#include "gated_binding.h"

namespace headrace {
namespace {

Tensor forward_cpu(const Tensor& gate_up, bool tanh) {
  return gated_forward_cpu(gate_up, "headrace::geglu_forward", [=](Dtype dtype, auto... rest) {
    geglu_forward_cpu(dtype, tanh, rest...);
  });
}

Tensor backward_cpu(const Tensor& grad, const Tensor& gate_up, bool tanh) {
  return gated_backward_cpu(grad, gate_up, "headrace::geglu_backward", [=](Dtype dtype, auto... rest) {
    geglu_backward_cpu(dtype, tanh, rest...);
  });
}

#ifdef HEADRACE_CUDA
Tensor forward_cuda(const Tensor& gate_up, bool tanh) {
  return gated_forward_cuda(gate_up, "headrace::geglu_forward", [=](Dtype dtype, auto... rest) {
    return geglu_forward_cuda(dtype, tanh, rest...);
  });
}

Tensor backward_cuda(const Tensor& grad, const Tensor& gate_up, bool tanh) {
  return gated_backward_cuda(grad, gate_up, "headrace::geglu_backward", [=](Dtype dtype, auto... rest) {
    return geglu_backward_cuda(dtype, tanh, rest...);
  });
}
#endif

HEADRACE_OPERATORS(library) {
  library.def("geglu_forward(Tensor gate_up, bool tanh) -> Tensor");
  library.def("geglu_backward(Tensor grad, Tensor gate_up, bool tanh) -> Tensor");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("geglu_forward", TORCH_BOX(&forward_cpu));
  library.impl("geglu_backward", TORCH_BOX(&backward_cpu));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("geglu_forward", TORCH_BOX(&forward_cuda));
  library.impl("geglu_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace headrace
