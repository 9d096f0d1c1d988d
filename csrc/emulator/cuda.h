// CUDA's words for g++, as far as our kernels use them: index variables, shared memory, barriers, shuffles, votes,
// atomics on integers and arithmetic. A word that is missing here is a compile error in the test of its kernel.
//
// Not emulated: asynchronous copies, clusters, tensor cores, textures, half-warp widths of shuffles, and that memory of
// other blocks is seen late. Sums of floating point by atomics are left out on purpose: their order is not fixed.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "block.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#define __global__
#define __device__
#define __host__
// All of them lie together in a section of the library (shared.ld), so that a block finds them poisoned.
#define __shared__ static
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

extern uint3 threadIdx, blockIdx;  // set whenever a thread goes on
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define HEADRACE_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HEADRACE_PLACE) { headrace::emulator::meet_block({"__syncthreads", file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, HEADRACE_PLACE) {
  headrace::emulator::meet_warp({"__syncwarp", file, line}, mask, 0, headrace::emulator::lane());
}

namespace headrace::emulator {

template <typename T>
T shuffle(Place place, unsigned mask, T value, unsigned from) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t), "shuffles take up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(place, mask, bits, from).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned vote(Place place, unsigned mask, bool predicate) {
  return meet_warp(place, mask, predicate ? 1 : 0, lane()).ballot;
}

}  // namespace headrace::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, HEADRACE_PLACE) {
  return headrace::emulator::shuffle({"__shfl_sync", file, line}, mask, value, static_cast<unsigned>(from) % 32);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, HEADRACE_PLACE) {
  const unsigned from = (headrace::emulator::lane() ^ static_cast<unsigned>(lanes)) % 32;
  return headrace::emulator::shuffle({"__shfl_xor_sync", file, line}, mask, value, from);
}

// Lanes past the end give a lane its own value back.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, HEADRACE_PLACE) {
  const unsigned lane = headrace::emulator::lane(), from = lane + by < 32 ? lane + by : lane;
  return headrace::emulator::shuffle({"__shfl_down_sync", file, line}, mask, value, from);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, HEADRACE_PLACE) {
  const unsigned lane = headrace::emulator::lane(), from = lane >= by ? lane - by : lane;
  return headrace::emulator::shuffle({"__shfl_up_sync", file, line}, mask, value, from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HEADRACE_PLACE) {
  return headrace::emulator::vote({"__ballot_sync", file, line}, mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate, HEADRACE_PLACE) {
  return headrace::emulator::vote({"__any_sync", file, line}, mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate, HEADRACE_PLACE) {
  return headrace::emulator::vote({"__all_sync", file, line}, mask, predicate == 0) == 0;
}

// Blocks run one after another and threads change at barriers only, so atomics need nothing here. CUDA's types, no more.
#define HEADRACE_ATOMIC(name, expression)                                     \
  template <typename T>                                                       \
  T name(T* address, std::common_type_t<T> x) {                               \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||    \
                      std::is_same_v<T, unsigned long long>,                  \
                  #name ": int, unsigned int or unsigned long long");         \
    const T old = *address;                                                   \
    *address = static_cast<T>(expression);                                    \
    return old;                                                               \
  }
HEADRACE_ATOMIC(atomicAdd, old + x)
HEADRACE_ATOMIC(atomicMax, old > x ? old : x)
HEADRACE_ATOMIC(atomicMin, old < x ? old : x)
HEADRACE_ATOMIC(atomicOr, old | x)
HEADRACE_ATOMIC(atomicExch, x)
#undef HEADRACE_ATOMIC

template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> x) {
  const T old = *address;
  if (old == expected) *address = x;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::common_type_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, std::common_type_t<T> value) {
  *address = value;
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline long long __float2ll_rn(float x) { return std::llrintf(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
