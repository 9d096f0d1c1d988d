// Bias and GELU in one: hidden = gelu(input + bias), and the gradients of both. Launchers only; no torch header.
//
// input, hidden and grad (of hidden) are [rows, width], contiguous; bias is [width], of the same dtype. `tanh` takes
// GELU's tanh approximation instead of the exact one (gelu_numbers.h). All arithmetic is fp32, input + bias included,
// and rounded once. Bytes moved for each number of hidden, bf16: forward 4, backward 6.
//
// The bias's gradient is a sum over rows, of numbers that are not rounded. It is taken in two stages in a fixed order:
// over kBiasGeluRows rows at a time into `partial`, then over those. So it is the same bit for bit from run to run, and
// does not depend on how many threads or processors share the work.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

constexpr int64_t kBiasGeluRows = 64;  // `partial` is then 1/16 of what else an fp32 backward pass moves, at most

// Rows of `partial`, float32[chunks, width].
constexpr int64_t bias_gelu_chunks(int64_t rows) { return (rows + kBiasGeluRows - 1) / kBiasGeluRows; }

// Numbers [begin, end) of hidden.
void bias_gelu_forward_cpu(Dtype, bool tanh, const void* input, const void* bias, void* hidden, int64_t width,
                           int64_t begin, int64_t end);
// Chunks [begin, end) of rows; writes their rows of grad_input and of partial.
void bias_gelu_backward_cpu(Dtype, bool tanh, const void* grad, const void* input, const void* bias, void* grad_input,
                            float* partial, int64_t rows, int64_t width, int64_t begin, int64_t end);
// Columns [begin, end) of the bias's gradient.
void bias_gelu_sum_cpu(Dtype, const float* partial, void* grad_bias, int64_t chunks, int64_t width, int64_t begin,
                       int64_t end);

// Widest row the CUDA launchers take: they count columns in 32 bits.
constexpr int64_t kBiasGeluMaxCudaWidth = int64_t{1} << 30;

// `stream` is a cudaStream_t. Asynchronous; they return the cudaError_t of the launch (0: none). Rows and width are at
// least 1.
int bias_gelu_forward_cuda(Dtype, bool tanh, const void* input, const void* bias, void* hidden, int64_t rows,
                           int64_t width, void* stream);
int bias_gelu_backward_cuda(Dtype, bool tanh, const void* grad, const void* input, const void* bias, void* grad_input,
                            float* partial, void* grad_bias, int64_t rows, int64_t width, void* stream);

}  // namespace headrace
