// Many tensors in one call: each is cut into chunks, and a chunk is what one task of a CPU and one block of a GPU work
// on. A table has a row for each tensor; chunks are numbered over the whole table, and a row says which is its first.
//
//   sizes of tensors        40,000    100    0    20,000
//   chunks                  0 1 2     3           4 5
//   first_chunk of a row    0         3      4    4
//
// Results do not depend on who works on which chunk: what is summed over a tensor is summed within chunks first, each
// in one order, and then over chunks from the first to the last.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEADRACE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define HEADRACE_EVERYWHERE inline __attribute__((always_inline))
#endif

namespace headrace {

// Numbers in a chunk. 64 KiB of fp32: long against starting a block, and a tensor of a million is work for 64 of them.
constexpr int64_t kChunk = 16384;

// Chunks of all tensors together that the CUDA launchers take, a block each: 35 terabytes of fp32 weights.
constexpr int64_t kMaxChunks = (int64_t{1} << 31) - 1;

HEADRACE_EVERYWHERE constexpr int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// The row whose tensor a chunk belongs to: the last one that begins at it or before.
template <typename Row>
HEADRACE_EVERYWHERE int64_t row_of(const Row* rows, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (rows[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace headrace
