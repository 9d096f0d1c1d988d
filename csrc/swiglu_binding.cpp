// Operators headrace::swiglu_forward and headrace::swiglu_backward. Mathematics and layout: swiglu.h.
#include <vector>

#include "binding.h"
#include "swiglu.h"

namespace headrace {
namespace {

// Width of `hidden`, half of gate_up's last dimension.
int64_t width_of(const Tensor& gate_up, const char* op) {
  STD_TORCH_CHECK(gate_up.dim() > 0 && gate_up.size(gate_up.dim() - 1) % 2 == 0, op,
                  ": the last dimension must be gate and up side by side, so even");
  check_contiguous(gate_up, "gate_up", op);
  return gate_up.size(gate_up.dim() - 1) / 2;
}

Tensor empty_hidden(const Tensor& gate_up, int64_t width) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < gate_up.dim(); ++dim) sizes.push_back(gate_up.size(dim));
  sizes.push_back(width);
  return torch::stable::new_empty(gate_up, sizes);
}

void check_grad(const Tensor& grad, const Tensor& gate_up, int64_t width, const char* op) {
  bool fits = grad.dim() == gate_up.dim() && grad.size(grad.dim() - 1) == width;
  for (int64_t dim = 0; fits && dim + 1 < grad.dim(); ++dim) fits = grad.size(dim) == gate_up.size(dim);
  STD_TORCH_CHECK(fits, op, ": grad must have gate_up's shape with half its last dimension");
  check_same_dtype(grad, gate_up, "grad and gate_up", op);
  check_same_device(grad, gate_up, "grad and gate_up", op);
  check_contiguous(grad, "grad", op);
}

Tensor swiglu_forward_cpu(const Tensor& gate_up) {
  const char* op = "headrace::swiglu_forward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = width_of(gate_up, op);
  Tensor hidden = empty_hidden(gate_up, width);
  const void* in = gate_up.const_data_ptr();
  void* out = hidden.mutable_data_ptr();
  torch::stable::parallel_for(0, hidden.numel(), kGrain, [=](int64_t begin, int64_t end) {
    headrace::swiglu_forward_cpu(dtype, in, out, width, begin, end);
  });
  return hidden;
}

Tensor swiglu_backward_cpu(const Tensor& grad, const Tensor& gate_up) {
  const char* op = "headrace::swiglu_backward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = width_of(gate_up, op);
  check_grad(grad, gate_up, width, op);
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  const void *upstream = grad.const_data_ptr(), *in = gate_up.const_data_ptr();
  void* out = grad_gate_up.mutable_data_ptr();
  torch::stable::parallel_for(0, grad.numel(), kGrain, [=](int64_t begin, int64_t end) {
    headrace::swiglu_backward_cpu(dtype, upstream, in, out, width, begin, end);
  });
  return grad_gate_up;
}

#ifdef HEADRACE_CUDA
Tensor swiglu_forward_cuda(const Tensor& gate_up) {
  const char* op = "headrace::swiglu_forward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = width_of(gate_up, op);
  STD_TORCH_CHECK(width <= headrace::kMaxCudaWidth, op, ": the last dimension is too long");
  Tensor hidden = empty_hidden(gate_up, width);
  if (hidden.numel() == 0) return hidden;
  const OnDeviceOf guard(gate_up);
  check_cuda(headrace::swiglu_forward_cuda(dtype, gate_up.const_data_ptr(), hidden.mutable_data_ptr(),
                                           hidden.numel() / width, width, stream_of(gate_up)),
             op);
  return hidden;
}

Tensor swiglu_backward_cuda(const Tensor& grad, const Tensor& gate_up) {
  const char* op = "headrace::swiglu_backward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = width_of(gate_up, op);
  STD_TORCH_CHECK(width <= headrace::kMaxCudaWidth, op, ": the last dimension is too long");
  check_grad(grad, gate_up, width, op);
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  if (grad.numel() == 0) return grad_gate_up;
  const OnDeviceOf guard(gate_up);
  check_cuda(headrace::swiglu_backward_cuda(dtype, grad.const_data_ptr(), gate_up.const_data_ptr(),
                                            grad_gate_up.mutable_data_ptr(), grad.numel() / width, width,
                                            stream_of(gate_up)),
             op);
  return grad_gate_up;
}
#endif

HEADRACE_OPERATORS(library) {
  library.def("swiglu_forward(Tensor gate_up) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cpu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cuda));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
}
#endif

}  // namespace
}  // namespace headrace
