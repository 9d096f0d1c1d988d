// How a .cu file starts its kernels: HEADRACE_LAUNCH(kernel, blocks, threads, stream, arguments...).
//
// nvcc makes it a launch. Compiled by g++ (`g++ -x c++ -Wno-unknown-pragmas swiglu.cu`, with CUDA's headers), the same
// source runs on the CPU, one thread after another: that is how tests/csrc runs a kernel's index arithmetic where there
// is no GPU. Good for kernels whose threads do not talk to each other, as all here.
#pragma once

#include <cuda_runtime_api.h>

#ifdef __CUDACC__

#define HEADRACE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define HEADRACE_LAUNCH_STATUS() static_cast<int>(cudaGetLastError())

#else

#include <cmath>

struct EmulatedIndex {
  unsigned x;
};
inline thread_local EmulatedIndex threadIdx, blockIdx, blockDim;
#define __launch_bounds__(...)

#define HEADRACE_LAUNCH(kernel, blocks, threads, stream, ...)                      \
  do {                                                                             \
    static_cast<void>(stream);                                                     \
    blockDim.x = (threads);                                                        \
    for (blockIdx.x = 0; blockIdx.x < (blocks); ++blockIdx.x)                      \
      for (threadIdx.x = 0; threadIdx.x < (threads); ++threadIdx.x) kernel(__VA_ARGS__); \
  } while (false)
#define HEADRACE_LAUNCH_STATUS() 0

#endif
