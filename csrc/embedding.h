// Gradient of an embedding's table: row `token` of it is the sum of the gradients of all places where the token stood.
// Launchers only; no torch header.
//
// grad is [places, width], contiguous. Places are given by token: `tokens` int64[places] in rising order, and `order`
// int64[places], where in grad each of them is (a stable sort gives both), so that a token's places are a run. Only rows
// with a token are touched; tokens outside [0, rows) are left out, as those of other vocabulary-parallel ranks are.
//
// Deterministic without atomics: a run is cut into segments of kEmbeddingSegment places from its start, each segment is
// summed in fp32 in the order of places, then the segments are added in order. CPU and GPU give the same bits, however
// the work is divided. Bytes moved: grad once, each row with a token once (written) or twice (added to), and on the GPU
// twice the sums of segments of runs with more than one.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

constexpr int64_t kEmbeddingSegment = 64;

// Runs that begin at places [begin, end) of the sorted ones. `add`: adds to `table`, float32[rows, width]; otherwise
// writes to `table`, of grad's dtype.
void embedding_gradient_cpu(Dtype, bool add, const void* grad, const int64_t* tokens, const int64_t* order, void* table,
                            int64_t places, int64_t rows, int64_t width, int64_t begin, int64_t end);

// Sums of segments that the CUDA launcher keeps, in rows of `partial`, float32[embedding_partials(places), width]: two
// for each kEmbeddingSegment places, since the end of one long run and the start of another can lie among them.
constexpr int64_t embedding_partials(int64_t places) {
  return places > kEmbeddingSegment ? 2 * ((places + kEmbeddingSegment - 1) / kEmbeddingSegment) : 0;
}

// `stream` is a cudaStream_t. Asynchronous; it returns the cudaError_t of the launch (0: none). Places are 1 to 2^30, the
// width 1 to 2^30.
int embedding_gradient_cuda(Dtype, bool add, const void* grad, const int64_t* tokens, const int64_t* order, void* table,
                            float* partial, int64_t places, int64_t rows, int64_t width, void* stream);

}  // namespace headrace
