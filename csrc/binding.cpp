// Registers the kernels as torch operators `headrace::*`: CPU implementations, and CUDA ones when compiled with
// HEADRACE_CUDA.
//
// Only torch's stable ABI is used (TORCH_TARGET_VERSION 2.11, set by setup.py): one library loads into every torch from
// 2.11 on, with and without CUDA, under every CPython. Shapes for the compiler and gradients: parallel/kernels/.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "swiglu.h"

#ifdef HEADRACE_CUDA
#include <cuda_runtime_api.h>
// Only CUDA builds of libtorch have it. Weak, so that the library with CUDA kernels in it loads into the others too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using headrace::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // numbers a thread is worth waking for; ATen's own

Dtype dtype_of(const Tensor& tensor, const char* op) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op,
                  ": dtype must be float32 or bfloat16");
  return type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

// Width of `hidden`, half of gate_up's last dimension.
int64_t width_of(const Tensor& gate_up, const char* op) {
  STD_TORCH_CHECK(gate_up.dim() > 0 && gate_up.size(gate_up.dim() - 1) % 2 == 0, op,
                  ": the last dimension must be gate and up side by side, so even");
  STD_TORCH_CHECK(gate_up.is_contiguous(), op, ": gate_up must be contiguous");
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
  STD_TORCH_CHECK(grad.scalar_type() == gate_up.scalar_type(), op, ": grad and gate_up must have the same dtype");
  STD_TORCH_CHECK(grad.get_device() == gate_up.get_device() && grad.is_cuda() == gate_up.is_cuda(), op,
                  ": grad and gate_up must be on the same device");
  STD_TORCH_CHECK(grad.is_contiguous(), op, ": grad must be contiguous");
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
void* stream_of(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_cuda(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

Tensor swiglu_forward_cuda(const Tensor& gate_up) {
  const char* op = "headrace::swiglu_forward";
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = width_of(gate_up, op);
  STD_TORCH_CHECK(width <= headrace::kMaxCudaWidth, op, ": the last dimension is too long");
  Tensor hidden = empty_hidden(gate_up, width);
  if (hidden.numel() == 0) return hidden;
  const torch::stable::accelerator::DeviceGuard guard(gate_up.get_device_index());
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
  const torch::stable::accelerator::DeviceGuard guard(gate_up.get_device_index());
  check_cuda(headrace::swiglu_backward_cuda(dtype, grad.const_data_ptr(), gate_up.const_data_ptr(),
                                            grad_gate_up.mutable_data_ptr(), grad.numel() / width, width,
                                            stream_of(gate_up)),
             op);
  return grad_gate_up;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(headrace, library) {
  library.def("swiglu_forward(Tensor gate_up) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, library) {
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cpu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}

#ifdef HEADRACE_CUDA
STABLE_TORCH_LIBRARY_IMPL(headrace, CUDA, library) {
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cuda));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
}
#endif
