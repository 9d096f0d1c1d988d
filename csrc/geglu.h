// GeGLU (arXiv 2002.05202): hidden = gelu(gate) * up, with the exact GELU or its tanh approximation (gelu_numbers.h).
// Launchers only; no torch header.
//
// Layout as in swiglu.h: gate_up is [rows, 2 * width], contiguous, the gate first; hidden and grad (of hidden) are
// [rows, width]. All arithmetic is fp32 and rounded once; bytes moved for each number of `hidden`, bf16: forward 6,
// backward 10.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

// Numbers [begin, end) of hidden (forward) and the two that belong to each in gate_up's gradient (backward), so that
// callers can divide the work as they like; the result does not depend on how.
void geglu_forward_cpu(Dtype, bool tanh, const void* gate_up, void* hidden, int64_t width, int64_t begin, int64_t end);
void geglu_backward_cpu(Dtype, bool tanh, const void* grad, const void* gate_up, void* grad_gate_up, int64_t width,
                        int64_t begin, int64_t end);

// `stream` is a cudaStream_t. Asynchronous; they return the cudaError_t of the launch (0: none). The width is at most
// kMaxCudaWidth (gated_binding.h).
int geglu_forward_cuda(Dtype, bool tanh, const void* gate_up, void* hidden, int64_t rows, int64_t width, void* stream);
int geglu_backward_cuda(Dtype, bool tanh, const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows,
                        int64_t width, void* stream);

}  // namespace headrace
