// Operators headrace::swiglu_forward and headrace::swiglu_backward. Mathematics and layout: swiglu.h.
#include "swiglu.h"

#include "gated_binding.h"

namespace headrace {
namespace {

Tensor forward_cpu(const Tensor& gate_up) {
  return gated_forward_cpu(gate_up, "headrace::swiglu_forward", swiglu_forward_cpu);
}

Tensor backward_cpu(const Tensor& grad, const Tensor& gate_up) {
  return gated_backward_cpu(grad, gate_up, "headrace::swiglu_backward", swiglu_backward_cpu);
}

#ifdef HEADRACE_CUDA
Tensor forward_cuda(const Tensor& gate_up) {
  return gated_forward_cuda(gate_up, "headrace::swiglu_forward", swiglu_forward_cuda);
}

Tensor backward_cuda(const Tensor& grad, const Tensor& gate_up) {
  return gated_backward_cuda(grad, gate_up, "headrace::swiglu_backward", swiglu_backward_cuda);
}
#endif

HEADRACE_OPERATORS(library) {
  library.def("swiglu_forward(Tensor gate_up) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("swiglu_forward", TORCH_BOX(&forward_cpu));
  library.impl("swiglu_backward", TORCH_BOX(&backward_cpu));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("swiglu_forward", TORCH_BOX(&forward_cuda));
  library.impl("swiglu_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace headrace
