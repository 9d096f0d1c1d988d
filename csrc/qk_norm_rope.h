// Norm and rotary embedding (RoPE, arXiv 2104.09864) of queries and keys, out of the fused QKV projection. Launchers
// only; no torch header.
//
//     qkv         [tokens, groups, queries_per_group + 2, head_size]: each group is its queries, its key, its value, as
//                 megatron-core lays out the output of linear_qkv; values are left where they are
//     query       [tokens, groups * queries_per_group, head_size]
//     key         [tokens, groups, head_size]
//     cos, sin    [table_rows, head_size / 2]; a token's row is its position in its document
//     statistics  fp32[tokens, groups, queries_per_group + 1, n], of queries and key; n = 0 without a norm, 1 (1 / rms)
//                 for RMSNorm (arXiv 1910.07467), 2 (mean, 1 / standard deviation) for LayerNorm (arXiv 1607.06450)
//     lengths     fp32[tokens, groups, queries_per_group + 1]: of the rotated queries and keys, as rounded
//
// With x^ = x, x / rms or (x - mean) / deviation, and y = x^ * weight + bias, dimension i is turned with i + half:
//
//     out[i] = y[i] cos[i] - y[i + half] sin[i]        out[i + half] = y[i + half] cos[i] + y[i] sin[i]
//
// All tensors are contiguous. All arithmetic is fp32 and rounded once. Bytes moved in bf16: forward 4 for each number of
// queries and keys; backward 6 for these and 4 for each of values, whose gradient is copied into that of qkv. The
// backward pass needs qkv and statistics only.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

struct QkvShape {
  int64_t tokens, groups, queries_per_group, head_size;
};

// What both passes read. Weights and biases are [head_size] of qkv's dtype, null where the norm has none.
struct QkInput {
  Dtype dtype;
  QkvShape shape;
  int statistics_per_head;  // n above: which norm
  const void* qkv;
  const void* positions;  // int64, or int32 if not
  bool positions_are_int64;
  const void *cos, *sin;
  int64_t table_rows;
  const void *query_weight, *key_weight, *query_bias, *key_bias;
};

struct QkForward {
  QkInput input;
  float eps;
  void *query, *key;
  float* statistics;
  float* lengths;  // null: not wanted
};

struct QkBackward {
  QkInput input;
  const float* statistics;
  const void *grad_query, *grad_key, *grad_value;
  void* grad_qkv;
  float* partials;      // sums over some of the heads; below
  float* grad_weights;  // fp32[2 (query, key), n (weight, bias), head_size]
};

// On a CPU partials are fp32[parts, 2, n, head_size]. So many tokens make a part, the last one fewer, however the work is
// divided.
constexpr int64_t kQkTokensOfPart = 32;

// Tokens [begin, end), or parts [begin, end); positions must be rows of the table.
void qk_norm_rope_forward_cpu(const QkForward&, int64_t begin, int64_t end);
void qk_norm_rope_backward_cpu(const QkBackward&, int64_t begin, int64_t end);
// Then: adds the parts up, one after the other.
void qk_norm_rope_sum_parts_cpu(const QkBackward&, int64_t parts);

constexpr int64_t kQkMaxCudaHeadSize = 512;
// Most numbers of heads (queries, keys and values of all tokens) that the CUDA launchers count, in 32 bits.
constexpr int64_t kQkMaxCudaHeads = (int64_t{1} << 31) - 1;

// On a GPU partials are fp32[parts, n, head_size], some of them for queries, the rest for keys. The number depends on the
// shape only.
int64_t qk_norm_rope_parts_cuda(const QkvShape&);

// `stream` is a cudaStream_t. Asynchronous; they return the cudaError_t of the launch (0: none). A position that is no
// row of the table gives NaN.
int qk_norm_rope_forward_cuda(const QkForward&, void* stream);
int qk_norm_rope_backward_cuda(const QkBackward&, void* stream);

}  // namespace headrace
