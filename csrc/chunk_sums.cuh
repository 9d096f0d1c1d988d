// Second stage of sums over tensors whose first stage left one number for each chunk. Include it in .cu files only.
#pragma once

#include "chunks.h"
#include "device.cuh"

namespace headrace {
namespace {

constexpr unsigned kSumThreads = 256;

// One block for each row: sums[row][column] of the chunks' partial_sums[chunk][column], in fp64.
template <typename Row, int columns>
__global__ void __launch_bounds__(kSumThreads)
    add_chunks(const Row* __restrict__ rows, const float* __restrict__ partial_sums, double* __restrict__ sums) {
  const int64_t row = blockIdx.x, first = rows[row].first_chunk, chunks = chunks_of(rows[row].size);
#pragma unroll
  for (int column = 0; column < columns; ++column) {
    double sum = 0.0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kSumThreads)
      sum += static_cast<double>(partial_sums[(first + chunk) * columns + column]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[row * columns + column] = sum;
  }
}

}  // namespace
}  // namespace headrace
