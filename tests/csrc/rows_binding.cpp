#include "rows.h"

#include "binding.h"

namespace headrace {
namespace {

void turn_rows_cuda(Tensor x, Tensor largest, Tensor found) {
  const char* op = "headrace::turn_rows";
  check_cuda(turn_rows(static_cast<float*>(x.mutable_data_ptr()), static_cast<float*>(largest.mutable_data_ptr()),
                         static_cast<unsigned long long*>(found.mutable_data_ptr()), x.size(0), x.size(1),
                         stream_of(x)),
             op);
}

HEADRACE_OPERATORS(library) { library.def("turn_rows(Tensor(a!) x, Tensor(b!) largest, Tensor(c!) found) -> ()"); }

HEADRACE_CUDA_KERNELS(library) { library.impl("turn_rows", TORCH_BOX(&turn_rows_cuda)); }

}  // namespace
}  // namespace headrace
