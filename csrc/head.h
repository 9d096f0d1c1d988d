// The loss of a language model's head: cross entropy of a chunk of logits, with z-loss and max-z loss, and the gradient
// of the logits in their place. Launchers only; no torch header. The matrix products around it: parallel/kernels/.
//
// Rows are tokens, columns are this rank's part of the vocabulary; logits are [rows, columns], contiguous. For a row x
// of the whole vocabulary with label l and weight w, M = max x and Z = sum of exp(x):
//
//   reported  = log Z - x_l
//   minimised = reported + z_loss * (log Z)^2 + max_z_loss * M^2       (arXiv 2204.02311 s. 5; arXiv 2309.10305 s. 2.4)
//   d x_j     = w * ((1 + 2 z_loss log Z) exp(x_j) / Z - [j = l] + 2 max_z_loss M [j is the first column where x is M])
//
// A row whose label is `ignore_index` has no loss, is counted nowhere and gets a gradient of 0, and so does, for the
// gradient, a row of weight 0; whatever their logits are. A label outside of the vocabulary, and a source that is not
// there, make the loss NaN: a kernel on a GPU cannot complain.
//
// Sums over a row are made part by part: 16 parts of equal width for the whole vocabulary, wherever it is split over a
// power of two of ranks up to 16 and its size is a multiple of 128, so that the loss of given logits is the same bit for
// bit under any such split. `statistics` of a row are float32[2 * parts + 3]: maximum and sum of exp(x - maximum) of each
// part, the column of the row's first maximum, the label's logit (0 where another rank has it), the sum of all logits.
//
// Bytes for each logit: 4 in bf16, read and written once (the second reading comes from the cache); split over ranks 6.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace headrace {

constexpr int kHeadParts = 16;     // of a whole vocabulary
constexpr int kMostHeadParts = 32; // of all ranks: a warp's lanes hold them
constexpr int64_t kMostHeadColumns = int64_t{1} << 24;  // a column's number is kept as fp32
constexpr int kHeadCounters = 5;   // tokens, loss, z-loss terms, correct, not finite
constexpr double kHeadZUnit = 4294967296.0;  // z-loss terms are counted in units of 2^-32

struct HeadLogits {
  Dtype dtype;
  void* logits;
  int64_t rows, columns;
  int64_t first_column;  // of this rank, in the whole vocabulary
  int64_t vocabulary;    // columns of all ranks
  const int64_t* labels;
  int64_t ignore_index;
  int parts;              // this rank's
  int64_t part_width;     // columns of each but the last ones
};

struct HeadLoss {
  const float* weights;     // [rows]
  const int64_t* sources;   // [rows], which row of `counters` a token belongs to
  int64_t num_sources;
  int64_t* counters;        // [num_sources, kHeadCounters], added to; the order does not matter, they are whole numbers
  float z_loss, max_z_loss;
  double loss_unit;         // the loss is counted in units of 1 / loss_unit
  bool gradient;            // false: logits are left as they are
  float* losses;            // [3, rows]: reported, minimised, this rank's sum of logits
};

// `part_width`: whole packs of 16 bytes, in bf16 too.
inline int64_t head_part_width(int64_t columns, int parts) { return ((columns + parts - 1) / parts + 7) / 8 * 8; }

// Rows [begin, end). `statistics`: float32[rows, 2 * parts + 3]; `gathered`: those of all ranks, [ranks, rows, ...].
void head_statistics_cpu(const HeadLogits&, float* statistics, int64_t begin, int64_t end);
void head_gradient_cpu(const HeadLogits&, const HeadLoss&, const float* gathered, int ranks, int64_t begin, int64_t end);
// Both at once, for a vocabulary that is not split.
void head_chunk_cpu(const HeadLogits&, const HeadLoss&, int64_t begin, int64_t end);

// All rows. `stream` is a cudaStream_t. Asynchronous; they return the cudaError_t of the launch (0: none).
int head_statistics_cuda(const HeadLogits&, float* statistics, void* stream);
int head_gradient_cuda(const HeadLogits&, const HeadLoss&, const float* gathered, int ranks, void* stream);
int head_chunk_cuda(const HeadLogits&, const HeadLoss&, void* stream);

}  // namespace headrace
