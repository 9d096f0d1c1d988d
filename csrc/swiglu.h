// SwiGLU (arXiv 2002.05202): hidden = silu(gate) * up, silu(x) = x / (1 + exp(-x)). Launchers only; no torch header.
//
// Rows are tokens. gate_up is [rows, 2 * width], contiguous: the first `width` numbers of a row are the gate, the rest
// what it gates, as megatron-core fused fc1 lays them out. hidden and grad (of hidden) are [rows, width].
// All arithmetic is fp32 and rounded once; bytes moved for each number of `hidden`, bf16: forward 6, backward 10.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

// Numbers [begin, end) of hidden (forward) and the two that belong to each in gate_up's gradient (backward), so that
// callers can divide the work as they like; the result does not depend on how.
void swiglu_forward_cpu(Dtype, const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end);
void swiglu_backward_cpu(Dtype, const void* grad, const void* gate_up, void* grad_gate_up, int64_t width, int64_t begin,
                         int64_t end);

// `stream` is a cudaStream_t. Asynchronous; they return the cudaError_t of the launch (0: none). The width is at most
// kMaxCudaWidth (gated_binding.h).
int swiglu_forward_cuda(Dtype, const void* gate_up, void* hidden, int64_t rows, int64_t width, void* stream);
int swiglu_backward_cuda(Dtype, const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows, int64_t width,
                         void* stream);

}  // namespace headrace
