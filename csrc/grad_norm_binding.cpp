// Operator headrace::square_sums. Mathematics and layout: grad_norm.h.
#include <cmath>
#include <tuple>
#include <vector>

#include "binding.h"
#include "grad_norm.h"
#include "tables.h"

namespace headrace {
namespace {

constexpr const char* kOp = "headrace::square_sums";

// (of each tensor, of all, whether that is not finite)
using Sums = std::tuple<Tensor, Tensor, Tensor>;

Sums empty_sums(const std::vector<Tensor>& gradients) {
  STD_TORCH_CHECK(!gradients.empty(), kOp, ": there is no gradient");
  check_list(gradients, gradients, "gradients", kOp);
  const ScalarType type = gradients[0].scalar_type();
  dtype_of(gradients[0], kOp);
  check_list_dtype(gradients, type, "gradients", "all of one dtype", kOp);
  return {torch::stable::new_empty(gradients[0], {static_cast<int64_t>(gradients.size())}, ScalarType::Double),
          torch::stable::new_empty(gradients[0], {1}, ScalarType::Double),
          torch::stable::new_empty(gradients[0], {1}, ScalarType::Float)};
}

std::vector<GradNormTensor> table_of(const std::vector<Tensor>& gradients) {
  std::vector<GradNormTensor> rows;
  rows.reserve(gradients.size());
  for (const Tensor& gradient : gradients) {
    const void* pointer = gradient.const_data_ptr();
    rows.push_back({pointer, gradient.numel(), 0, reinterpret_cast<uintptr_t>(pointer) % 16 == 0});
  }
  return rows;
}

Sums square_sums_cpu(std::vector<Tensor> gradients) {
  Sums result = empty_sums(gradients);
  const Dtype dtype = dtype_of(gradients[0], kOp);
  std::vector<GradNormTensor> rows = table_of(gradients);
  const int64_t count = static_cast<int64_t>(rows.size()), chunks = number_chunks(rows);
  std::vector<double> partial(static_cast<size_t>(chunks));
  torch::stable::parallel_for(0, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    headrace::square_sums_cpu(dtype, rows.data(), count, partial.data(), begin, end);
  });
  double* sums = static_cast<double*>(std::get<0>(result).mutable_data_ptr());
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const GradNormTensor& row = rows[static_cast<size_t>(i)];
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks_of(row.size); ++chunk)
      sum += partial[static_cast<size_t>(row.first_chunk + chunk)];
    sums[i] = sum;
    total += sum;
  }
  *static_cast<double*>(std::get<1>(result).mutable_data_ptr()) = total;
  *static_cast<float*>(std::get<2>(result).mutable_data_ptr()) = std::isfinite(total) ? 0.0f : 1.0f;
  return result;
}

#ifdef HEADRACE_CUDA
Sums square_sums_cuda(std::vector<Tensor> gradients) {
  Sums result = empty_sums(gradients);
  const Dtype dtype = dtype_of(gradients[0], kOp);
  std::vector<GradNormTensor> rows = table_of(gradients);
  const int64_t count = static_cast<int64_t>(rows.size()), chunks = number_chunks(rows);
  STD_TORCH_CHECK(chunks <= kMaxChunks, kOp, ": there are too many gradients for one launch");
  const OnDeviceOf guard(gradients[0]);
  void* stream = stream_of(gradients[0]);
  const Tensor table = on_device(rows, gradients[0], stream, kOp);
  Tensor partial = torch::stable::new_empty(gradients[0], {chunks}, ScalarType::Float);
  check_cuda(headrace::square_sums_cuda(dtype, static_cast<const GradNormTensor*>(table.const_data_ptr()), count,
                                        chunks, static_cast<float*>(partial.mutable_data_ptr()),
                                        static_cast<double*>(std::get<0>(result).mutable_data_ptr()),
                                        static_cast<double*>(std::get<1>(result).mutable_data_ptr()),
                                        static_cast<float*>(std::get<2>(result).mutable_data_ptr()), stream),
             kOp);
  return result;
}
#endif

HEADRACE_OPERATORS(library) { library.def("square_sums(Tensor[] gradients) -> (Tensor, Tensor, Tensor)"); }

HEADRACE_CPU_KERNELS(library) { library.impl("square_sums", TORCH_BOX(&square_sums_cpu)); }

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) { library.impl("square_sums", TORCH_BOX(&square_sums_cuda)); }
#endif

}  // namespace
}  // namespace headrace
