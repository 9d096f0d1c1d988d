// For the bindings of gated activations: checks of gate_up [..., 2 * width] and of the gradient of hidden [..., width].
#pragma once

#include <vector>

#include "binding.h"

namespace headrace {

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

}  // namespace headrace
