// For the bindings of gated activations: checks of gate_up [..., 2 * width] and of the gradient of hidden [..., width],
// and the operators themselves, given their launchers.
#pragma once

#include <vector>

#include "binding.h"

namespace headrace {

// Widest row the CUDA launchers take: they count 16-byte packs of a launch in 32 bits.
constexpr int64_t kMaxCudaWidth = int64_t{1} << 30;

// Width of `hidden`, half of gate_up's last dimension.
inline int64_t gated_width(const Tensor& gate_up, const char* op) {
  STD_TORCH_CHECK(gate_up.dim() > 0 && gate_up.size(gate_up.dim() - 1) % 2 == 0, op,
                  ": the last dimension must be gate and up side by side, so even");
  check_contiguous(gate_up, "gate_up", op);
  return gate_up.size(gate_up.dim() - 1) / 2;
}

inline Tensor empty_hidden(const Tensor& gate_up, int64_t width) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < gate_up.dim(); ++dim) sizes.push_back(gate_up.size(dim));
  sizes.push_back(width);
  return torch::stable::new_empty(gate_up, sizes);
}

inline void check_gated_grad(const Tensor& grad, const Tensor& gate_up, int64_t width, const char* op) {
  bool fits = grad.dim() == gate_up.dim() && grad.size(grad.dim() - 1) == width;
  for (int64_t dim = 0; fits && dim + 1 < grad.dim(); ++dim) fits = grad.size(dim) == gate_up.size(dim);
  STD_TORCH_CHECK(fits, op, ": grad must have gate_up's shape with half its last dimension");
  check_same_dtype(grad, gate_up, "grad and gate_up", op);
  check_same_device(grad, gate_up, "grad and gate_up", op);
  check_contiguous(grad, "grad", op);
}

// `run`: (dtype, gate_up, hidden, width, begin, end).
template <typename Run>
Tensor gated_forward_cpu(const Tensor& gate_up, const char* op, const Run& run) {
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  Tensor hidden = empty_hidden(gate_up, width);
  const void* in = gate_up.const_data_ptr();
  void* out = hidden.mutable_data_ptr();
  torch::stable::parallel_for(0, hidden.numel(), kGrain,
                              [=](int64_t begin, int64_t end) { run(dtype, in, out, width, begin, end); });
  return hidden;
}

// `run`: (dtype, grad, gate_up, grad_gate_up, width, begin, end).
template <typename Run>
Tensor gated_backward_cpu(const Tensor& grad, const Tensor& gate_up, const char* op, const Run& run) {
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  check_gated_grad(grad, gate_up, width, op);
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  const void *upstream = grad.const_data_ptr(), *in = gate_up.const_data_ptr();
  void* out = grad_gate_up.mutable_data_ptr();
  torch::stable::parallel_for(0, grad.numel(), kGrain,
                              [=](int64_t begin, int64_t end) { run(dtype, upstream, in, out, width, begin, end); });
  return grad_gate_up;
}

#ifdef HEADRACE_CUDA
// `launch`: (dtype, gate_up, hidden, rows, width, stream).
template <typename Launch>
Tensor gated_forward_cuda(const Tensor& gate_up, const char* op, const Launch& launch) {
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  STD_TORCH_CHECK(width <= kMaxCudaWidth, op, ": the last dimension is too long");
  Tensor hidden = empty_hidden(gate_up, width);
  if (hidden.numel() == 0) return hidden;
  const OnDeviceOf guard(gate_up);
  check_cuda(launch(dtype, gate_up.const_data_ptr(), hidden.mutable_data_ptr(), hidden.numel() / width, width,
                    stream_of(gate_up)),
             op);
  return hidden;
}

// `launch`: (dtype, grad, gate_up, grad_gate_up, rows, width, stream).
template <typename Launch>
Tensor gated_backward_cuda(const Tensor& grad, const Tensor& gate_up, const char* op, const Launch& launch) {
  const Dtype dtype = dtype_of(gate_up, op);
  const int64_t width = gated_width(gate_up, op);
  STD_TORCH_CHECK(width <= kMaxCudaWidth, op, ": the last dimension is too long");
  check_gated_grad(grad, gate_up, width, op);
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  if (grad.numel() == 0) return grad_gate_up;
  const OnDeviceOf guard(gate_up);
  check_cuda(launch(dtype, grad.const_data_ptr(), gate_up.const_data_ptr(), grad_gate_up.mutable_data_ptr(),
                    grad.numel() / width, width, stream_of(gate_up)),
             op);
  return grad_gate_up;
}
#endif

}  // namespace headrace
