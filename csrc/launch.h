// How a .cu file starts its kernels:
//
//   HEADRACE_LAUNCH(kernel, blocks, threads, stream, arguments...);
//   HEADRACE_LAUNCH_SHARED(kernel, blocks, threads, bytes of dynamic shared memory, stream, arguments...);
//   if (const int error = HEADRACE_LAUNCH_STATUS()) return error;  // a cudaError_t
//
// A template's arguments need parentheses: HEADRACE_LAUNCH((forward<float, 4>), ...). In a kernel,
// HEADRACE_DYNAMIC_SHARED(float, row); declares `float* row`, its dynamic shared memory.
//
// nvcc makes these launches. g++ compiles the same source for the CPU, where csrc/emulator/ runs it; see there.
#pragma once

#include <cuda_runtime_api.h>

#ifdef __CUDACC__

#define HEADRACE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// More than 48 KB of dynamic shared memory must be asked for; kernels that need less are left alone.
#define HEADRACE_LAUNCH_SHARED(kernel, blocks, threads, bytes, stream, ...)                                      \
  do {                                                                                                           \
    if ((bytes) <= 48 * 1024 || cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,        \
                                                     static_cast<int>(bytes)) == cudaSuccess)                    \
      kernel<<<(blocks), (threads), (bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                  \
  } while (false)
#define HEADRACE_LAUNCH_STATUS() static_cast<int>(cudaGetLastError())
#define HEADRACE_DYNAMIC_SHARED(T, name)                                      \
  extern __shared__ __align__(16) unsigned char headrace_dynamic_shared[];    \
  T* const name = reinterpret_cast<T*>(headrace_dynamic_shared)

#else

#include "emulator/cuda.h"

#define HEADRACE_LAUNCH(kernel, blocks, threads, stream, ...) \
  HEADRACE_LAUNCH_SHARED(kernel, blocks, threads, 0, stream, __VA_ARGS__)
#define HEADRACE_LAUNCH_SHARED(kernel, blocks, threads, bytes, stream, ...) \
  (static_cast<void>(stream), ::headrace::emulator::launch(#kernel, blocks, threads, bytes, [&] { kernel(__VA_ARGS__); }))
#define HEADRACE_LAUNCH_STATUS() ::headrace::emulator::launch_status()
#define HEADRACE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::headrace::emulator::dynamic_shared())

#endif
