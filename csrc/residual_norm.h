// A residual addition and the norm that follows it, in one pass over memory. Plain launchers; no torch header.
//
//   stream     = x + residual                    rounded to the activations' dtype, in which it goes on to the next block
//   RMSNorm      normalised = stream * rstd * weight,                rstd = 1 / sqrt(mean(stream^2) + eps)
//   LayerNorm    normalised = (stream - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance(stream) + eps)
//
// (arXiv 1910.07467, arXiv 1607.06450.) Rows are tokens, [rows, width], contiguous; activations are fp32 or bf16, weight
// and bias fp32 or bf16 on their own, statistics fp32. Without a residual (first and last norm of a model) x is the
// stream. square_sum, each row's sum of stream^2, gives the RMS of what a block adds up to without another pass.
//
// Backward takes both gradients that arrive at the stream, that of `normalised` (n) and that of `stream` itself (s):
//
//   centred = (stream - mean) * rstd,  g = n * weight         (mean = 0 for RMSNorm)
//   grad        = s + rstd * (g - centred * mean(g * centred) - mean(g))      the last term for LayerNorm only
//   grad_weight = sum over rows of n * centred,  grad_bias = sum over rows of n
//
// x and residual have the same gradient. All arithmetic is fp32 and every result is rounded once. The sums over rows are
// taken by groups of rows, whose partial sums are then added in a fixed order: no atomics, the same bits every time.
//
// Bytes moved for each number of a row, bf16: forward 8 (4 without residual), backward 8 (6 without s).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

struct ResidualNormForward {
  Dtype dtype;         // of x, residual, stream and normalised
  Dtype weight_dtype;  // of weight and bias
  bool layer_norm;     // false: RMSNorm
  const void* x;
  const void* residual;  // null: none
  const void* weight;    // [width]
  const void* bias;      // [width]; LayerNorm only
  void* stream;          // null without residual
  void* normalised;
  float* mean;  // [rows]; LayerNorm only
  float* rstd;  // [rows]
  float* square_sum;  // [rows]
  int64_t rows, width;
  float eps;
};

struct ResidualNormBackward {
  Dtype dtype;         // of every gradient of an activation, and of stream
  Dtype weight_dtype;  // of weight, grad_weight and grad_bias
  bool layer_norm;
  const void* grad_normalised;
  const void* grad_stream;  // null: none
  const void* stream;
  const void* weight;
  const float* mean;  // [rows]; LayerNorm only
  const float* rstd;  // [rows]
  void* grad;         // of x and of residual
  void* grad_weight;  // [width]
  void* grad_bias;    // [width]; LayerNorm only
  float* partial_sums;  // scratch, [groups, width] of grad_weight, after them as many of grad_bias (LayerNorm)
  int64_t groups;
  int64_t rows, width;
};

// Rows [begin, end); the result does not depend on how callers divide them.
void residual_norm_forward_cpu(const ResidualNormForward&, int64_t begin, int64_t end);

// Groups of rows that the CPU takes, a function of `rows` alone.
int64_t residual_norm_groups_cpu(int64_t rows);
// First the groups [begin, end): `grad` and partial_sums, which need not be cleared. Then, when all are done, columns
// [begin, end) of grad_weight and grad_bias.
void residual_norm_backward_cpu(const ResidualNormBackward&, int64_t begin, int64_t end);
void residual_norm_sum_groups_cpu(const ResidualNormBackward&, int64_t begin, int64_t end);

// Longest row and most rows that the CUDA launchers take.
constexpr int64_t kMaxNormWidth = int64_t{1} << 30;
constexpr int64_t kMaxNormRows = (int64_t{1} << 31) - 1;

// Groups of rows, one for each block of the backward kernel, for a GPU of this many multiprocessors.
int64_t residual_norm_groups_cuda(Dtype, int64_t rows, int64_t width, int64_t multiprocessors);

// `stream` is a cudaStream_t. Asynchronous; they return the cudaError_t of the launch (0: none). rows and width >= 1.
int residual_norm_forward_cuda(const ResidualNormForward&, void* stream);
int residual_norm_backward_cuda(const ResidualNormBackward&, void* stream);

}  // namespace headrace
