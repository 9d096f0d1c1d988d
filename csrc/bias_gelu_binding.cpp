// Operators headrace::bias_gelu_forward and headrace::bias_gelu_backward. Mathematics and layout: bias_gelu.h.
#include "bias_gelu.h"

#include <algorithm>
#include <tuple>

#include "binding.h"

namespace headrace {
namespace {

// Numbers in a row.
int64_t width_of(const Tensor& input, const Tensor& bias, const char* op) {
  STD_TORCH_CHECK(input.dim() > 0 && bias.dim() == 1 && bias.size(0) == input.size(input.dim() - 1), op,
                  ": bias must be as long as input's last dimension");
  check_same_dtype(bias, input, "bias and input", op);
  check_same_device(bias, input, "bias and input", op);
  check_contiguous(input, "input", op);
  check_contiguous(bias, "bias", op);
  return bias.size(0);
}

void check_grad(const Tensor& grad, const Tensor& input, const char* op) {
  check_same_shape(grad, input, "grad and input", op);
  check_same_dtype(grad, input, "grad and input", op);
  check_same_device(grad, input, "grad and input", op);
  check_contiguous(grad, "grad", op);
}

Tensor forward_cpu(const Tensor& input, const Tensor& bias, bool tanh) {
  const char* op = "headrace::bias_gelu_forward";
  const Dtype dtype = dtype_of(input, op);
  const int64_t width = width_of(input, bias, op);
  Tensor hidden = torch::stable::empty_like(input);
  const void *in = input.const_data_ptr(), *add = bias.const_data_ptr();
  void* out = hidden.mutable_data_ptr();
  torch::stable::parallel_for(0, hidden.numel(), kGrain, [=](int64_t begin, int64_t end) {
    bias_gelu_forward_cpu(dtype, tanh, in, add, out, width, begin, end);
  });
  return hidden;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& bias, bool tanh) {
  const char* op = "headrace::bias_gelu_backward";
  const Dtype dtype = dtype_of(input, op);
  const int64_t width = width_of(input, bias, op);
  check_grad(grad, input, op);
  const int64_t rows = width > 0 ? input.numel() / width : 0, chunks = bias_gelu_chunks(rows);
  Tensor grad_input = torch::stable::empty_like(input), grad_bias = torch::stable::empty_like(bias);
  const Tensor partial = torch::stable::new_empty(input, {chunks, width}, ScalarType::Float);
  const void *upstream = grad.const_data_ptr(), *in = input.const_data_ptr(), *add = bias.const_data_ptr();
  void *out = grad_input.mutable_data_ptr(), *out_bias = grad_bias.mutable_data_ptr();
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  const int64_t chunk_grain = std::max<int64_t>(1, kGrain / (kBiasGeluRows * std::max<int64_t>(1, width)));
  torch::stable::parallel_for(0, chunks, chunk_grain, [=](int64_t begin, int64_t end) {
    bias_gelu_backward_cpu(dtype, tanh, upstream, in, add, out, sums, rows, width, begin, end);
  });
  const int64_t column_grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(1, chunks));
  torch::stable::parallel_for(0, width, column_grain, [=](int64_t begin, int64_t end) {
    bias_gelu_sum_cpu(dtype, sums, out_bias, chunks, width, begin, end);
  });
  return {grad_input, grad_bias};
}

#ifdef HEADRACE_CUDA
Tensor forward_cuda(const Tensor& input, const Tensor& bias, bool tanh) {
  const char* op = "headrace::bias_gelu_forward";
  const Dtype dtype = dtype_of(input, op);
  const int64_t width = width_of(input, bias, op);
  STD_TORCH_CHECK(width <= kBiasGeluMaxCudaWidth, op, ": the last dimension is too long");
  Tensor hidden = torch::stable::empty_like(input);
  if (hidden.numel() == 0) return hidden;
  const OnDeviceOf guard(input);
  check_cuda(bias_gelu_forward_cuda(dtype, tanh, input.const_data_ptr(), bias.const_data_ptr(),
                                    hidden.mutable_data_ptr(), hidden.numel() / width, width, stream_of(input)),
             op);
  return hidden;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad, const Tensor& input, const Tensor& bias, bool tanh) {
  const char* op = "headrace::bias_gelu_backward";
  const Dtype dtype = dtype_of(input, op);
  const int64_t width = width_of(input, bias, op);
  STD_TORCH_CHECK(width <= kBiasGeluMaxCudaWidth, op, ": the last dimension is too long");
  check_grad(grad, input, op);
  Tensor grad_input = torch::stable::empty_like(input);
  if (input.numel() == 0) return {grad_input, torch::stable::new_zeros(bias, {width})};
  Tensor grad_bias = torch::stable::empty_like(bias);
  const int64_t rows = input.numel() / width;
  const Tensor partial = torch::stable::new_empty(input, {bias_gelu_chunks(rows), width}, ScalarType::Float);
  const OnDeviceOf guard(input);
  check_cuda(bias_gelu_backward_cuda(dtype, tanh, grad.const_data_ptr(), input.const_data_ptr(), bias.const_data_ptr(),
                                     grad_input.mutable_data_ptr(), static_cast<float*>(partial.mutable_data_ptr()),
                                     grad_bias.mutable_data_ptr(), rows, width, stream_of(input)),
             op);
  return {grad_input, grad_bias};
}
#endif

HEADRACE_OPERATORS(library) {
  library.def("bias_gelu_forward(Tensor input, Tensor bias, bool tanh) -> Tensor");
  library.def("bias_gelu_backward(Tensor grad, Tensor input, Tensor bias, bool tanh) -> (Tensor, Tensor)");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("bias_gelu_forward", TORCH_BOX(&forward_cpu));
  library.impl("bias_gelu_backward", TORCH_BOX(&backward_cpu));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("bias_gelu_forward", TORCH_BOX(&forward_cuda));
  library.impl("bias_gelu_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace headrace
