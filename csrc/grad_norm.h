// Sums of squares of many tensors, for the norm of all gradients: of each tensor, and of all together. Launchers only;
// no torch header. Bytes moved for each number: 4, or 2 for bf16.
//
// Always the same bits for the same tensors: every sum has one order, whoever computes it (see chunks.h). Squares are
// fp32, so above 1.8e19 a gradient's is infinite, as it is in torch.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "dtype.h"

namespace headrace {

// A row of the table; on a GPU all of it is in device memory.
struct GradNormTensor {
  const void* gradient;  // fp32 [size] or bf16 [size], the same dtype for the whole table
  int64_t size;
  int64_t first_chunk;
  int32_t packed;        // `gradient` is a multiple of 16
};

// Sums of chunks [begin, end) of the table, each to its place in `partial_sums`, double [chunks].
void square_sums_cpu(Dtype gradient, const GradNormTensor* tensors, int64_t count, double* partial_sums, int64_t begin,
                     int64_t end);

// All sums: `sums`, double [count], of the tensors; `total`, double [1]; and whether that is not finite, `not_finite`,
// float [1], 1 or 0. `partial_sums` is room for float [chunks]. All of it is device memory, `stream` a cudaStream_t.
// Three launches. Asynchronous; returns the cudaError_t of the launches (0: none).
int square_sums_cuda(Dtype gradient, const GradNormTensor* tensors, int64_t count, int64_t chunks, float* partial_sums,
                     double* sums, double* total, float* not_finite, void* stream);

}  // namespace headrace
