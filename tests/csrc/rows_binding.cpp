#include "rows.h"

#include "binding.h"

namespace headrace {
namespace {

void center_rows_cuda(Tensor x, Tensor sums, Tensor found) {
  const char* op = "headrace::center_rows";
  check_cuda(center_rows(static_cast<float*>(x.mutable_data_ptr()), static_cast<float*>(sums.mutable_data_ptr()),
                         static_cast<unsigned long long*>(found.mutable_data_ptr()), x.size(0), x.size(1),
                         stream_of(x)),
             op);
}

HEADRACE_OPERATORS(library) { library.def("center_rows(Tensor(a!) x, Tensor(b!) sums, Tensor(c!) found) -> ()"); }

HEADRACE_CUDA_KERNELS(library) { library.impl("center_rows", TORCH_BOX(&center_rows_cuda)); }

}  // namespace
}  // namespace headrace
