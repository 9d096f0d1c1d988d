// Operators headrace::embedding_gradient and headrace::embedding_gradient_add_. Mathematics and layout: embedding.h.
#include "embedding.h"

#include <algorithm>

#include "binding.h"

namespace headrace {
namespace {

constexpr int64_t kMaxCudaSize = int64_t{1} << 30;  // places and width, which kernels count in 32 bits

void check(const Tensor& grad, const Tensor& tokens, const Tensor& order, const char* op) {
  STD_TORCH_CHECK(grad.dim() == 2, op, ": grad must have two dimensions");
  check_dtype(tokens, ScalarType::Long, "tokens", "int64", op);
  check_dtype(order, ScalarType::Long, "order", "int64", op);
  check_shape(tokens, {grad.size(0)}, "tokens", op);
  check_shape(order, {grad.size(0)}, "order", op);
  check_same_device(tokens, grad, "tokens and grad", op);
  check_same_device(order, grad, "order and grad", op);
  check_contiguous(grad, "grad", op);
  check_contiguous(tokens, "tokens", op);
  check_contiguous(order, "order", op);
}

void check_table(const Tensor& table, const Tensor& grad, const char* op) {
  check_dtype(table, ScalarType::Float, "table", "float32", op);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == grad.size(1), op, ": table must have rows as long as grad's");
  check_same_device(table, grad, "table and grad", op);
  check_contiguous(table, "table", op);
}

// The table of a new gradient; tokens that do not occur have 0.
Tensor new_table(const Tensor& grad, int64_t rows, const char* op) {
  STD_TORCH_CHECK(rows >= 0, op, ": rows must not be negative");
  return torch::stable::new_zeros(grad, {rows, grad.size(1)});
}

void run_cpu(const Tensor& grad, const Tensor& tokens, const Tensor& order, const Tensor& table, bool add,
             const char* op) {
  const Dtype dtype = dtype_of(grad, op);
  const int64_t places = grad.size(0), width = grad.size(1), rows = table.size(0);
  const void* from = grad.const_data_ptr();
  const auto* token = static_cast<const int64_t*>(tokens.const_data_ptr());
  const auto* place = static_cast<const int64_t*>(order.const_data_ptr());
  for (int64_t i = 0; i < places; ++i) {
    STD_TORCH_CHECK(i == 0 || token[i - 1] <= token[i], op, ": tokens must be in rising order");
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < places, op, ": order must be places in grad");
  }
  if (width == 0) return;
  void* to = table.mutable_data_ptr();
  torch::stable::parallel_for(0, places, std::max<int64_t>(1, kGrain / width), [=](int64_t begin, int64_t end) {
    embedding_gradient_cpu(dtype, add, from, token, place, to, places, rows, width, begin, end);
  });
}

Tensor gradient_cpu(const Tensor& grad, const Tensor& tokens, const Tensor& order, int64_t rows) {
  const char* op = "headrace::embedding_gradient";
  check(grad, tokens, order, op);
  Tensor table = new_table(grad, rows, op);
  run_cpu(grad, tokens, order, table, false, op);
  return table;
}

void gradient_add_cpu(Tensor table, const Tensor& grad, const Tensor& tokens, const Tensor& order) {
  const char* op = "headrace::embedding_gradient_add_";
  check(grad, tokens, order, op);
  check_table(table, grad, op);
  run_cpu(grad, tokens, order, table, true, op);
}

#ifdef HEADRACE_CUDA
void run_cuda(const Tensor& grad, const Tensor& tokens, const Tensor& order, const Tensor& table, bool add,
              const char* op) {
  const Dtype dtype = dtype_of(grad, op);
  const int64_t places = grad.size(0), width = grad.size(1);
  STD_TORCH_CHECK(places <= kMaxCudaSize && width <= kMaxCudaSize, op, ": grad is too long");
  if (grad.numel() == 0) return;
  const OnDeviceOf guard(grad);
  const Tensor partial = torch::stable::new_empty(grad, {embedding_partials(places), width}, ScalarType::Float);
  check_cuda(embedding_gradient_cuda(dtype, add, grad.const_data_ptr(),
                                     static_cast<const int64_t*>(tokens.const_data_ptr()),
                                     static_cast<const int64_t*>(order.const_data_ptr()), table.mutable_data_ptr(),
                                     static_cast<float*>(partial.mutable_data_ptr()), places, table.size(0), width,
                                     stream_of(grad)),
             op);
}

Tensor gradient_cuda(const Tensor& grad, const Tensor& tokens, const Tensor& order, int64_t rows) {
  const char* op = "headrace::embedding_gradient";
  check(grad, tokens, order, op);
  Tensor table = new_table(grad, rows, op);
  run_cuda(grad, tokens, order, table, false, op);
  return table;
}

void gradient_add_cuda(Tensor table, const Tensor& grad, const Tensor& tokens, const Tensor& order) {
  const char* op = "headrace::embedding_gradient_add_";
  check(grad, tokens, order, op);
  check_table(table, grad, op);
  run_cuda(grad, tokens, order, table, true, op);
}
#endif

HEADRACE_OPERATORS(library) {
  library.def("embedding_gradient(Tensor grad, Tensor tokens, Tensor order, int rows) -> Tensor");
  library.def("embedding_gradient_add_(Tensor(a!) table, Tensor grad, Tensor tokens, Tensor order) -> ()");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("embedding_gradient", TORCH_BOX(&gradient_cpu));
  library.impl("embedding_gradient_add_", TORCH_BOX(&gradient_add_cpu));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("embedding_gradient", TORCH_BOX(&gradient_cuda));
  library.impl("embedding_gradient_add_", TORCH_BOX(&gradient_add_cuda));
}
#endif

}  // namespace
}  // namespace headrace
