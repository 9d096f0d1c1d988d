// Operators headrace::geglu_forward and headrace::geglu_backward. Mathematics and layout: geglu.h.
#include "geglu.h"

#include "gated_binding.h"
#include "swiglu.h"

namespace headrace {
namespace {

Tensor forward_cpu(const Tensor& gate_up, bool tanh) {
  const char* op = "headrace::geglu_forward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  Tensor hidden = empty_hidden(gate_up, width);
  const void* in = gate_up.const_data_ptr();
  void* out = hidden.mutable_data_ptr();
  torch::stable::parallel_for(0, hidden.numel(), kGrain, [=](int64_t begin, int64_t end) {
    geglu_forward_cpu(dtype, tanh, in, out, width, begin, end);
  });
  return hidden;
}

Tensor backward_cpu(const Tensor& grad, const Tensor& gate_up, bool tanh) {
  const char* op = "headrace::geglu_backward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  check_gated_grad(grad, gate_up, width, op);
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  const void *upstream = grad.const_data_ptr(), *in = gate_up.const_data_ptr();
  void* out = grad_gate_up.mutable_data_ptr();
  torch::stable::parallel_for(0, grad.numel(), kGrain, [=](int64_t begin, int64_t end) {
    geglu_backward_cpu(dtype, tanh, upstream, in, out, width, begin, end);
  });
  return grad_gate_up;
}

#ifdef HEADRACE_CUDA
Tensor forward_cuda(const Tensor& gate_up, bool tanh) {
  const char* op = "headrace::geglu_forward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  STD_TORCH_CHECK(width <= kMaxCudaWidth, op, ": the last dimension is too long");
  Tensor hidden = empty_hidden(gate_up, width);
  if (hidden.numel() == 0) return hidden;
  const OnDeviceOf guard(gate_up);
  check_cuda(geglu_forward_cuda(dtype, tanh, gate_up.const_data_ptr(), hidden.mutable_data_ptr(),
                                hidden.numel() / width, width, stream_of(gate_up)),
             op);
  return hidden;
}

Tensor backward_cuda(const Tensor& grad, const Tensor& gate_up, bool tanh) {
  const char* op = "headrace::geglu_backward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  STD_TORCH_CHECK(width <= kMaxCudaWidth, op, ": the last dimension is too long");
  check_gated_grad(grad, gate_up, width, op);
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  if (grad.numel() == 0) return grad_gate_up;
  const OnDeviceOf guard(gate_up);
  check_cuda(geglu_backward_cuda(dtype, tanh, grad.const_data_ptr(), gate_up.const_data_ptr(),
                                 grad_gate_up.mutable_data_ptr(), grad.numel() / width, width, stream_of(gate_up)),
             op);
  return grad_gate_up;
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
