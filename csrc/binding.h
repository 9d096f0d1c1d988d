// What the files *_binding.cpp share: checks of tensors, streams, and the registration of operators `headrace::*`.
//
//   HEADRACE_OPERATORS(library) { library.def("swiglu_forward(Tensor gate_up) -> Tensor"); }
//   HEADRACE_CPU_KERNELS(library) { library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cpu)); }
//   #ifdef HEADRACE_CUDA
//   HEADRACE_CUDA_KERNELS(library) { library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cuda)); }
//   #endif
//
// Only torch's stable ABI is used (TORCH_TARGET_VERSION 2.11, set by setup.py): one library loads into every torch from
// 2.11 on, with and without CUDA, under every CPython. Shapes for the compiler and gradients: parallel/kernels/.
//
// With HEADRACE_EMULATED (tests/csrc) the same file registers its CUDA kernels, which g++ compiled with csrc/emulator/,
// for CPU tensors, in a library of the name that HEADRACE_LIBRARY gives.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

#include "dtype.h"

#ifdef HEADRACE_CUDA
#include <cuda_runtime_api.h>
#ifdef HEADRACE_EMULATED
extern "C" const char* headrace_failure();
#else
// Only CUDA builds of libtorch have it. Weak, so that the library with CUDA kernels in it loads into the others too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif
#endif

#ifdef HEADRACE_EMULATED
#define HEADRACE_OPERATORS(library) STABLE_TORCH_LIBRARY_FRAGMENT(HEADRACE_LIBRARY, library)
#define HEADRACE_CUDA_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(HEADRACE_LIBRARY, CPU, library)
// Compiled and never called: the optimizer drops it, and with it all that names a CPU kernel.
#define HEADRACE_CPU_KERNELS(library) \
  [[maybe_unused]] static void headrace_cpu_kernels(torch::stable::detail::StableLibrary& library)
#else
#define HEADRACE_OPERATORS(library) STABLE_TORCH_LIBRARY_FRAGMENT(headrace, library)
#define HEADRACE_CPU_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, library)
#define HEADRACE_CUDA_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(headrace, CUDA, library)
#endif

namespace headrace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // numbers a thread is worth waking for; ATen's own

// All of these throw what Python sees as RuntimeError("headrace::<op>: <name> must ...").

inline Dtype dtype_of(const Tensor& tensor, const char* op) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op,
                  ": dtype must be float32 or bfloat16");
  return type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

inline void check_dtype(const Tensor& tensor, ScalarType type, const char* name, const char* type_name,
                        const char* op) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", type_name);
}

inline void check_contiguous(const Tensor& tensor, const char* name, const char* op) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name, const char* op) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    fits = fits && tensor.size(dim) == size;
    ++dim;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " has a wrong shape");
}

inline void check_same_dtype(const Tensor& tensor, const Tensor& other, const char* names, const char* op) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", names, " must have the same dtype");
}

inline void check_same_device(const Tensor& tensor, const Tensor& other, const char* names, const char* op) {
  STD_TORCH_CHECK(tensor.get_device() == other.get_device() && tensor.is_cuda() == other.is_cuda(), op, ": ", names,
                  " must be on the same device");
}

inline void check_same_shape(const Tensor& tensor, const Tensor& other, const char* names, const char* op) {
  bool fits = tensor.dim() == other.dim();
  for (int64_t dim = 0; fits && dim < tensor.dim(); ++dim) fits = tensor.size(dim) == other.size(dim);
  STD_TORCH_CHECK(fits, op, ": ", names, " must have the same shape");
}

#ifdef HEADRACE_CUDA
// The stream that torch works on at the moment, on the tensor's device; a cudaStream_t.
inline void* stream_of(const Tensor& tensor) {
#ifdef HEADRACE_EMULATED
  static_cast<void>(tensor);
  return nullptr;
#else
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
#endif
}

// Throws for a launcher's answer, a cudaError_t, unless it is cudaSuccess.
inline void check_cuda(int error, const char* op) {
#ifdef HEADRACE_EMULATED
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, " ", headrace_failure());
#else
  STD_TORCH_CHECK(error == 0, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
#endif
}

// While it lives, kernels start on the tensor's device.
class OnDeviceOf {
 public:
#ifdef HEADRACE_EMULATED
  explicit OnDeviceOf(const Tensor& tensor) { static_cast<void>(tensor); }
#else
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};
#endif

}  // namespace headrace
