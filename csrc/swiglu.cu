// SwiGLU on the GPU: one pass over memory, one thread for each 16 bytes of `hidden`. Mathematics and layout: swiglu.h.
#include "swiglu.h"

#include "device.cuh"

namespace headrace {
namespace {

constexpr unsigned kThreads = 256;

#ifndef HEADRACE_PACKS_PER_LAUNCH  // tests lower it: nothing that fits on a small machine fills one launch
#define HEADRACE_PACKS_PER_LAUNCH (int64_t{1} << 30)
#endif
constexpr int64_t kPacksPerLaunch = HEADRACE_PACKS_PER_LAUNCH;  // so that a pack's number fits in 32 bits

// `row_packs` packs are a row of hidden; in gate_up each row is twice as long.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward(const Pack<T, N>* __restrict__ gate_up, Pack<T, N>* __restrict__ hidden, unsigned packs,
            unsigned row_packs) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= packs) return;
  const Pack<T, N>* from = gate_up + at + static_cast<int64_t>(at / row_packs) * row_packs;
  const Pack<T, N> gate = from[0], up = from[row_packs];
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = load(gate.values[i]);
    store(out.values[i], g / (1.0f + expf(-g)) * load(up.values[i]));
  }
  hidden[at] = out;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward(const Pack<T, N>* __restrict__ grad, const Pack<T, N>* __restrict__ gate_up,
             Pack<T, N>* __restrict__ grad_gate_up, unsigned packs, unsigned row_packs) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= packs) return;
  const int64_t from = at + static_cast<int64_t>(at / row_packs) * row_packs;
  const Pack<T, N> upstream = grad[at], gate = gate_up[from], up = gate_up[from + row_packs];
  Pack<T, N> grad_gate, grad_up;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float d = load(upstream.values[i]), g = load(gate.values[i]);
    const float one_plus_exp = 1.0f + expf(-g), sigmoid = 1.0f / one_plus_exp;
    // In torch's order, so that infinities meet zeros (NaN) where they do there.
    store(grad_gate.values[i], d * load(up.values[i]) * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    store(grad_up.values[i], d * (g / one_plus_exp));
  }
  grad_gate_up[from] = grad_gate;
  grad_gate_up[from + row_packs] = grad_up;
}

// Calls launch(first row, packs, packs in a row) for slices of rows that one launch can count.
template <typename Launch>
int for_each_slice(int64_t rows, int64_t row_packs, const Launch& launch) {
  const int64_t most = std::max<int64_t>(1, kPacksPerLaunch / row_packs);
  for (int64_t row = 0; row < rows; row += most) {
    launch(row, static_cast<unsigned>(std::min(most, rows - row) * row_packs), static_cast<unsigned>(row_packs));
    if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  }
  return 0;
}

unsigned blocks_for(unsigned packs) { return (packs + kThreads - 1) / kThreads; }

template <typename T, int N>
int launch_forward(const void* gate_up, void* hidden, int64_t rows, int64_t width, void* stream) {
  const auto* in = static_cast<const Pack<T, N>*>(gate_up);
  auto* out = static_cast<Pack<T, N>*>(hidden);
  return for_each_slice(rows, width / N, [=](int64_t row, unsigned packs, unsigned row_packs) {
    const int64_t at = row * row_packs;
    HEADRACE_LAUNCH((forward<T, N>), blocks_for(packs), kThreads, stream, in + 2 * at, out + at, packs, row_packs);
  });
}

template <typename T, int N>
int launch_backward(const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows, int64_t width,
                    void* stream) {
  const auto *upstream = static_cast<const Pack<T, N>*>(grad), *in = static_cast<const Pack<T, N>*>(gate_up);
  auto* out = static_cast<Pack<T, N>*>(grad_gate_up);
  return for_each_slice(rows, width / N, [=](int64_t row, unsigned packs, unsigned row_packs) {
    const int64_t at = row * row_packs;
    HEADRACE_LAUNCH((backward<T, N>), blocks_for(packs), kThreads, stream, upstream + at, in + 2 * at, out + 2 * at,
                    packs, row_packs);
  });
}

// 16-byte packs where rows and tensors begin on 16-byte boundaries, single numbers elsewhere.
template <typename T>
int forward_of(const void* gate_up, void* hidden, int64_t rows, int64_t width, void* stream) {
  const auto launch = packable<T>(width, {gate_up, hidden}) ? launch_forward<T, kPackSize<T>> : launch_forward<T, 1>;
  return launch(gate_up, hidden, rows, width, stream);
}

template <typename T>
int backward_of(const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows, int64_t width, void* stream) {
  const auto launch =
      packable<T>(width, {grad, gate_up, grad_gate_up}) ? launch_backward<T, kPackSize<T>> : launch_backward<T, 1>;
  return launch(grad, gate_up, grad_gate_up, rows, width, stream);
}

}  // namespace

int swiglu_forward_cuda(Dtype dtype, const void* gate_up, void* hidden, int64_t rows, int64_t width, void* stream) {
  const auto run = dtype == Dtype::float32 ? forward_of<float> : forward_of<__nv_bfloat16>;
  return run(gate_up, hidden, rows, width, stream);
}

int swiglu_backward_cuda(Dtype dtype, const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows,
                         int64_t width, void* stream) {
  const auto run = dtype == Dtype::float32 ? backward_of<float> : backward_of<__nv_bfloat16>;
  return run(grad, gate_up, grad_gate_up, rows, width, stream);
}

}  // namespace headrace
