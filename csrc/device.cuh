// For CUDA kernels: 16-byte packs of numbers, fp32 and bf16 alike, and sums and maxima over warps and blocks.
//
// Everything is in an order that depends on nothing but the number of threads: results are the same bit for bit from
// run to run. Include it in .cu files only.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "launch.h"

// HEADRACE_GLOBAL(pointer); tells the compiler that a pointer is to global memory. It knows that of a kernel's
// arguments; of pointers that a kernel reads from a table it does not, and emits generic loads and stores.
#ifdef __CUDACC__
#define HEADRACE_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define HEADRACE_GLOBAL(pointer) static_cast<void>(pointer)
#endif

namespace headrace {
namespace {

// N numbers that are loaded and stored at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

// Numbers of type T in 16 bytes, the most that one instruction loads.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether rows of `width` numbers, each behind the other, can be loaded in packs of 16 bytes from all these tensors.
template <typename T>
bool packable(int64_t width, std::initializer_list<const void*> tensors) {
  return width % kPackSize<T> == 0 && std::all_of(tensors.begin(), tensors.end(), aligned);
}

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The larger one; NaN if one of them is (fmaxf would drop it).
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

struct Plus {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return larger(a, b); }
};

// x of all 32 lanes, combined by a commutative operation and handed to each of them. The whole warp must call it.
template <typename T, typename Operation>
__device__ __forceinline__ T warp_reduce(T x, Operation operation) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = operation(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// x of all threads of a block of whole warps, handed to each of them. All threads must call it, and may call it again at
// once; what they wrote to shared memory before it can be read after it.
template <typename T, typename Operation>
__device__ __forceinline__ T block_reduce(T x, T neutral, Operation operation) {
  __shared__ T warps[kWarp];
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_reduce(x, operation);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  x = warp_reduce(lane < blockDim.x / kWarp ? warps[lane] : neutral, operation);
  __syncthreads();  // all have read: the next call may write
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce(x, Plus());
}

template <typename T>
__device__ __forceinline__ T block_sum(T x) {
  return block_reduce(x, T(0), Plus());
}

__device__ __forceinline__ float warp_max(float x) { return warp_reduce(x, Larger()); }
__device__ __forceinline__ float block_max(float x) { return block_reduce(x, -INFINITY, Larger()); }

}  // namespace
}  // namespace headrace
