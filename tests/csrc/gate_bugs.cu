// Kernels that break the rules of test_cuda_gates.py, to show that they are seen.
#include "device.cuh"

namespace headrace {
namespace {

struct Table {
  const float* from;
  float* to;
};

// The pointer may be to shared memory or to global memory.
__global__ void generic_access(const float* from, const int* at, float* to) {
  __shared__ float near[32];
  near[threadIdx.x] = from[threadIdx.x + 32];
  __syncthreads();
  const float* numbers = at[0] > 0 ? from : near;
  to[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

__global__ void table_access(const Table* table) {
  const float* from = table->from;
  float* to = table->to;
  HEADRACE_GLOBAL(from);
  HEADRACE_GLOBAL(to);
  to[threadIdx.x] = from[threadIdx.x];
}

__global__ void stack_frame(const float* from, const int* at, float* to) {
  float numbers[16];
  for (int i = 0; i < 16; ++i) numbers[i] = from[i * 32 + threadIdx.x];
  for (int i = 0; i < 100; ++i) numbers[at[i] % 16] += numbers[at[i + 100] % 16];  // a register has no address
  to[threadIdx.x] = numbers[at[threadIdx.x] % 16];
}

__global__ void narrow(const __nv_bfloat16* from, float* to) { to[threadIdx.x] = load(from[threadIdx.x]); }

__global__ void wide(const Pack<float, 4>* from, Pack<float, 4>* to) { to[threadIdx.x] = from[threadIdx.x]; }

// 80 numbers that are all needed in every round.
__global__ void many_registers(const float* from, float* to, int rounds) {
  float numbers[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) numbers[i] = from[i * 1024 + threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 80; ++i) numbers[i] = numbers[i] * numbers[(i + 41) % 80] + 1.0f;
  }
#pragma unroll
  for (int i = 0; i < 80; ++i) to[i * 1024 + threadIdx.x] = numbers[i];
}

}  // namespace

void launch_all(const Table* table, const float* from, const int* at, const __nv_bfloat16* half, float* to) {
  HEADRACE_LAUNCH(generic_access, 1, 32, nullptr, from, at, to);
  HEADRACE_LAUNCH(table_access, 1, 32, nullptr, table);
  HEADRACE_LAUNCH(stack_frame, 1, 32, nullptr, from, at, to);
  HEADRACE_LAUNCH(narrow, 1, 32, nullptr, half, to);
  HEADRACE_LAUNCH(wide, 1, 32, nullptr, reinterpret_cast<const Pack<float, 4>*>(from),
                  reinterpret_cast<Pack<float, 4>*>(to));
  HEADRACE_LAUNCH(many_registers, 1, 32, nullptr, from, to, 3);
}

}  // namespace headrace
