// Operators headrace::{rms_norm,residual_rms_norm,layer_norm,residual_layer_norm}_forward and
// headrace::{rms_norm,layer_norm}_backward. Mathematics and layout: residual_norm.h.
#include <optional>
#include <tuple>

#include "binding.h"
#include "residual_norm.h"

#ifdef HEADRACE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace headrace {
namespace {

using RunForward = void (*)(const ResidualNormForward&, const Tensor& like, const char* op);
using RunBackward = void (*)(ResidualNormBackward&, const Tensor& like, const char* op);

// [rows] of the activation `x`, for which all tensors that have one number for each row have room.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  return rows;
}

int64_t width_of(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, op, ": x must have a last dimension, of 1 or more numbers");
  check_contiguous(x, "x", op);
  return x.size(x.dim() - 1);
}

Tensor numbers_of(const Tensor& like, int64_t count, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, {count}, type);
}

void check_like(const Tensor& tensor, const Tensor& x, const char* names, const char* name, const char* op) {
  check_same_shape(tensor, x, names, op);
  check_same_dtype(tensor, x, names, op);
  check_same_device(tensor, x, names, op);
  check_contiguous(tensor, name, op);
}

void check_weight(const Tensor& weight, const Tensor& x, int64_t width, const char* names, const char* name,
                  const char* op) {
  check_shape(weight, {width}, name, op);
  check_same_device(weight, x, names, op);
  check_contiguous(weight, name, op);
}

void check_statistic(const Tensor& statistic, const Tensor& x, int64_t rows, const char* names, const char* name,
                     const char* op) {
  check_shape(statistic, {rows}, name, op);
  check_dtype(statistic, ScalarType::Float, name, "float32", op);
  check_same_device(statistic, x, names, op);
  check_contiguous(statistic, name, op);
}

struct ForwardResult {
  Tensor normalised, stream, mean, rstd, square_sum;
};

// `residual` and `bias` may be null; `bias` says which norm it is.
ForwardResult forward(RunForward run, const Tensor& x, const Tensor* residual, const Tensor& weight,
                      const Tensor* bias, double eps, const char* op) {
  ResidualNormForward call{};
  call.dtype = dtype_of(x, op);
  call.weight_dtype = dtype_of(weight, op);
  call.layer_norm = bias != nullptr;
  call.width = width_of(x, op);
  call.rows = rows_of(x);
  call.eps = static_cast<float>(eps);
  check_weight(weight, x, call.width, "weight and x", "weight", op);
  if (bias) {
    check_weight(*bias, x, call.width, "bias and x", "bias", op);
    check_same_dtype(*bias, weight, "bias and weight", op);
    call.bias = bias->const_data_ptr();
  }
  ForwardResult out{torch::stable::empty_like(x), x, x, numbers_of(x, call.rows), numbers_of(x, call.rows)};
  if (residual) {
    check_like(*residual, x, "residual and x", "residual", op);
    out.stream = torch::stable::empty_like(x);
    call.residual = residual->const_data_ptr();
    call.stream = out.stream.mutable_data_ptr();
  }
  if (bias) {
    out.mean = numbers_of(x, call.rows);
    call.mean = static_cast<float*>(out.mean.mutable_data_ptr());
  }
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.normalised = out.normalised.mutable_data_ptr();
  call.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  call.square_sum = static_cast<float*>(out.square_sum.mutable_data_ptr());
  if (call.rows > 0) run(call, x, op);
  return out;
}

struct BackwardResult {
  Tensor grad, grad_weight, grad_bias;
};

// `mean` may be null, and says which norm it is.
BackwardResult backward(RunBackward run, const Tensor& grad_normalised, const std::optional<Tensor>& grad_stream,
                        const Tensor& stream, const Tensor& weight, const Tensor* mean, const Tensor& rstd,
                        const char* op) {
  ResidualNormBackward call{};
  call.dtype = dtype_of(stream, op);
  call.weight_dtype = dtype_of(weight, op);
  call.layer_norm = mean != nullptr;
  call.width = width_of(stream, op);
  call.rows = rows_of(stream);
  check_like(grad_normalised, stream, "grad_normalised and stream", "grad_normalised", op);
  if (grad_stream.has_value()) {
    check_like(*grad_stream, stream, "grad_stream and stream", "grad_stream", op);
    call.grad_stream = grad_stream->const_data_ptr();
  }
  check_weight(weight, stream, call.width, "weight and stream", "weight", op);
  check_statistic(rstd, stream, call.rows, "rstd and stream", "rstd", op);
  Tensor grad_weight = torch::stable::empty_like(weight);
  BackwardResult out{torch::stable::empty_like(stream), grad_weight, grad_weight};
  if (mean) {
    check_statistic(*mean, stream, call.rows, "mean and stream", "mean", op);
    call.mean = static_cast<const float*>(mean->const_data_ptr());
    out.grad_bias = torch::stable::empty_like(weight);
    call.grad_bias = out.grad_bias.mutable_data_ptr();
  }
  call.grad_normalised = grad_normalised.const_data_ptr();
  call.stream = stream.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.rstd = static_cast<const float*>(rstd.const_data_ptr());
  call.grad = out.grad.mutable_data_ptr();
  call.grad_weight = out.grad_weight.mutable_data_ptr();
  if (call.rows > 0) {
    run(call, stream, op);
  } else {
    torch::stable::fill_(out.grad_weight, 0.0);
    if (mean) torch::stable::fill_(out.grad_bias, 0.0);
  }
  return out;
}

// Scratch for `call.groups` groups; it must live as long as `call` is used.
Tensor partial_sums_of(ResidualNormBackward& call, const Tensor& like) {
  Tensor sums = numbers_of(like, (call.layer_norm ? 2 : 1) * call.groups * call.width);
  call.partial_sums = static_cast<float*>(sums.mutable_data_ptr());
  return sums;
}

void run_forward_cpu(const ResidualNormForward& call, const Tensor&, const char*) {
  torch::stable::parallel_for(0, call.rows, (kGrain + call.width - 1) / call.width,
                              [&call](int64_t begin, int64_t end) { residual_norm_forward_cpu(call, begin, end); });
}

void run_backward_cpu(ResidualNormBackward& call, const Tensor& like, const char*) {
  call.groups = residual_norm_groups_cpu(call.rows);
  const Tensor scratch = partial_sums_of(call, like);
  const int64_t group_numbers = (call.rows + call.groups - 1) / call.groups * call.width;
  torch::stable::parallel_for(0, call.groups, (kGrain + group_numbers - 1) / group_numbers,
                              [&call](int64_t begin, int64_t end) { residual_norm_backward_cpu(call, begin, end); });
  torch::stable::parallel_for(0, call.width, (kGrain + call.groups - 1) / call.groups,
                              [&call](int64_t begin, int64_t end) { residual_norm_sum_groups_cpu(call, begin, end); });
}

#ifdef HEADRACE_CUDA
int64_t multiprocessors_of(const Tensor& tensor, const char* op) {
#ifdef HEADRACE_EMULATED
  static_cast<void>(tensor);
  static_cast<void>(op);
  return 2;
#else
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()), op);
  return count;
#endif
}

void check_sizes(int64_t rows, int64_t width, const char* op) {
  STD_TORCH_CHECK(width <= kMaxNormWidth, op, ": the last dimension is too long");
  STD_TORCH_CHECK(rows <= kMaxNormRows, op, ": too many rows");
}

void run_forward_cuda(const ResidualNormForward& call, const Tensor& like, const char* op) {
  check_sizes(call.rows, call.width, op);
  const OnDeviceOf guard(like);
  check_cuda(residual_norm_forward_cuda(call, stream_of(like)), op);
}

void run_backward_cuda(ResidualNormBackward& call, const Tensor& like, const char* op) {
  check_sizes(call.rows, call.width, op);
  const OnDeviceOf guard(like);
  call.groups = residual_norm_groups_cuda(call.dtype, call.rows, call.width, multiprocessors_of(like, op));
  const Tensor scratch = partial_sums_of(call, like);
  check_cuda(residual_norm_backward_cuda(call, stream_of(like)), op);
}
#endif

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  const ForwardResult out = forward(run, x, nullptr, weight, nullptr, eps, "headrace::rms_norm_forward");
  return {out.normalised, out.rstd, out.square_sum};
}

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_rms_norm_forward(const Tensor& x, const Tensor& residual,
                                                                     const Tensor& weight, double eps) {
  const ForwardResult out = forward(run, x, &residual, weight, nullptr, eps, "headrace::residual_rms_norm_forward");
  return {out.normalised, out.stream, out.rstd, out.square_sum};
}

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const Tensor& weight,
                                                              const Tensor& bias, double eps) {
  const ForwardResult out = forward(run, x, nullptr, weight, &bias, eps, "headrace::layer_norm_forward");
  return {out.normalised, out.mean, out.rstd, out.square_sum};
}

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                               const Tensor& weight,
                                                                               const Tensor& bias, double eps) {
  const ForwardResult out = forward(run, x, &residual, weight, &bias, eps, "headrace::residual_layer_norm_forward");
  return {out.normalised, out.stream, out.mean, out.rstd, out.square_sum};
}

template <RunBackward run>
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_normalised, std::optional<Tensor> grad_stream,
                                             const Tensor& stream, const Tensor& weight, const Tensor& rstd) {
  const BackwardResult out =
      backward(run, grad_normalised, grad_stream, stream, weight, nullptr, rstd, "headrace::rms_norm_backward");
  return {out.grad, out.grad_weight};
}

template <RunBackward run>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_normalised,
                                                       std::optional<Tensor> grad_stream, const Tensor& stream,
                                                       const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  const BackwardResult out =
      backward(run, grad_normalised, grad_stream, stream, weight, &mean, rstd, "headrace::layer_norm_backward");
  return {out.grad, out.grad_weight, out.grad_bias};
}

HEADRACE_OPERATORS(library) {
  library.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  library.def(
      "residual_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def("layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "residual_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "rms_norm_backward(Tensor grad_normalised, Tensor? grad_stream, Tensor stream, Tensor weight, Tensor rstd) "
      "-> (Tensor, Tensor)");
  library.def(
      "layer_norm_backward(Tensor grad_normalised, Tensor? grad_stream, Tensor stream, Tensor weight, Tensor mean, "
      "Tensor rstd) -> (Tensor, Tensor, Tensor)");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward<run_forward_cpu>));
  library.impl("residual_rms_norm_forward", TORCH_BOX(&residual_rms_norm_forward<run_forward_cpu>));
  library.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward<run_forward_cpu>));
  library.impl("residual_layer_norm_forward", TORCH_BOX(&residual_layer_norm_forward<run_forward_cpu>));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<run_backward_cpu>));
  library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward<run_backward_cpu>));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward<run_forward_cuda>));
  library.impl("residual_rms_norm_forward", TORCH_BOX(&residual_rms_norm_forward<run_forward_cuda>));
  library.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward<run_forward_cuda>));
  library.impl("residual_layer_norm_forward", TORCH_BOX(&residual_layer_norm_forward<run_forward_cuda>));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<run_backward_cuda>));
  library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward<run_backward_cuda>));
}
#endif

}  // namespace
}  // namespace headrace
