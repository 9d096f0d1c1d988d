// AdamW (arXiv 1711.05101) over many tensors at once, with gradient clipping, the 16-bit weights that go with fp32 ones,
// and sums for metrics, in one pass over memory. Launchers only; no torch header. Arithmetic: adamw_update.h.
//
// What a weight is, and bytes moved for each (fp32 gradient; with a bf16 one 2 fewer):
//
//   master            fp32, no 16-bit weight                                              28
//   master_and_copy   fp32, and a bf16 weight that is it rounded to nearest               30
//   remainder         bf16, and an int16 that has the lower half of an fp32 master        28
//   stochastic        bf16 alone, rounded up or down at random, right on average          24
//
// Both moments are fp32. Bit for bit the masters of the first three are the same. In `remainder` the bf16 weight is its
// master rounded to nearest with ties away from zero (ties to even could not be undone): the remainder's highest bit
// says whether it was rounded up.
//
// Random numbers of `stochastic` are a function of (seed, step, the number's place in the whole model) alone: they are
// the same for every way to shard the model.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "dtype.h"

namespace headrace {

enum class AdamwMode { master, master_and_copy, remainder, stochastic };

// Factors of one tensor's update, computed in double and rounded once, as torch does it.
struct AdamwFactors {
  float decay;             // 1 - lr * weight_decay
  float rest1;             // 1 - beta1, or -beta1 where that is 0.5 and above
  float beta2, rest2;      // beta2, 1 - beta2
  float minus_step_size;   // -lr / (1 - beta1^step)
  float root_correction2;  // sqrt(1 - beta2^step)
  float eps;
  int32_t from_gradient;   // whether the mean starts from the gradient: beta1 is below 0.5
};

// A row of the table; on a GPU all of it is in device memory. No two tensors share memory.
struct AdamwTensor {
  void* weight;          // fp32 [size] or bf16 [size]
  void* low;             // bf16 copy [size], int16 remainder [size], or null
  const void* gradient;  // fp32 [size] or bf16 [size], the same dtype for the whole table
  float *exp_avg, *exp_avg_sq;
  int64_t size;
  int64_t first_chunk;
  uint64_t base;         // place of the first number in the whole model
  uint64_t key;          // of the step's random numbers: the same for all ranks
  int32_t packed;        // all of the pointers are multiples of 16
  AdamwFactors factors;
};

// What gradients of this norm are multiplied with so that it is at most `max_norm` (0: no limit), as megatron-core does.
HEADRACE_EVERYWHERE float clip_scale(double norm, double max_norm) {
  const double scale = max_norm / (norm + 1.0e-6);
  return max_norm > 0.0 && scale < 1.0 ? static_cast<float>(scale) : 1.0f;
}

// Chunks [begin, end) of the table; `scale` is a factor of all gradients. `sums`, if not null, is double [chunks, 3]: of
// the chunk's gradients before `scale`, of the changes of its weights, and of its weights before the update, squares
// added up.
void adamw_cpu(AdamwMode mode, Dtype gradient, const AdamwTensor* tensors, int64_t count, float scale, double* sums,
               int64_t begin, int64_t end);

// The whole table in one launch. `grad_norm`, double [1] in device memory or null, is the norm of all gradients: they
// are scaled down to `max_norm` (0: never), and where it is not finite nothing changes and all sums are 0. `sums` is
// null, or double [count, 3], and `partial_sums` then room for float [chunks, 3]. `stream` is a cudaStream_t.
// Asynchronous; returns the cudaError_t of the launch (0: none).
int adamw_cuda(AdamwMode mode, Dtype gradient, const AdamwTensor* tensors, int64_t count, int64_t chunks,
               const double* grad_norm, double max_norm, float* partial_sums, double* sums, void* stream);

}  // namespace headrace
