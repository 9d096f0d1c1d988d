// The head's loss on the GPU: a block for each row, a warp for each part of its columns. Mathematics and layout: head.h.
//
// A row of a large vocabulary does not fit into a block's shared memory (280 KB at 139,776 columns in bf16). It is read
// once from memory for the statistics, and again for the gradient from the L2 cache (50 MB on an H100). Two rows are at
// work on each of its 132 multiprocessors: some 37 MB have been read and are still to be read again. A block must fit
// twice then, so 64 registers.
#include "head.h"

#include "device.cuh"

namespace headrace {
namespace {

constexpr int kUnroll = 4;          // packs that a lane has under way while it reads: 64 bytes
constexpr int kGradientUnroll = 2;  // while it reads and writes; with 4, two blocks would not fit

#ifdef __CUDACC__
// 2^x to 2 units in fp32's last place, denormals as 0: one instruction, where exp2f is four. At two for each logit that
// would be more than the memory leaves time for.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float power_of_two(float x) { return std::exp2(x); }
#endif

// exp(x - from), where x <= from. The difference first: it is exact where it matters.
__device__ __forceinline__ float exp_from(float x, float from) { return power_of_two((x - from) * 1.4426950408889634f); }

struct Smaller {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// What a block knows of its row after the statistics, by part.
struct Parts {
  float maxima[kHeadParts], sums[kHeadParts], logits[kHeadParts];
  int firsts[kHeadParts];  // columns of the maxima
  float label_logit;
};

// One part, by one warp: columns [begin, end), whole packs.
template <typename T, int N>
__device__ __forceinline__ void part_statistics(const T* __restrict__ row, int64_t begin, int64_t end, unsigned lane,
                                                unsigned part, Parts& parts) {
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(row);
  const int first_pack = static_cast<int>(begin / N), last_pack = static_cast<int>(end / N);
  // NaN are passed over by the maximum: they show in the sum.
  float maximum = -INFINITY, sum = 0.0f, logits = 0.0f;
  int pack_of_maximum = first_pack;
  for (int at = first_pack + static_cast<int>(lane); at < last_pack; at += kUnroll * static_cast<int>(kWarp)) {
    Pack<T, N> loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (at + i * static_cast<int>(kWarp) < last_pack) loaded[i] = packs[at + i * static_cast<int>(kWarp)];
    float higher = maximum;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (at + i * static_cast<int>(kWarp) < last_pack) {
        const float before = higher;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float x = load(loaded[i].values[j]);
          higher = fmaxf(higher, x);
          logits += x;
        }
        if (higher > before) pack_of_maximum = at + i * static_cast<int>(kWarp);
      }
    const float from = higher == -INFINITY ? 0.0f : higher;  // no difference of infinities
    sum *= exp_from(maximum, from);
    maximum = higher;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (at + i * static_cast<int>(kWarp) < last_pack) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum += exp_from(load(loaded[i].values[j]), from);
      }
  }
  const float highest = warp_reduce(maximum, [](float a, float b) { return fmaxf(a, b); });
  const float from = highest == -INFINITY ? 0.0f : highest;
  sum = warp_sum(sum * exp_from(maximum, from));
  logits = warp_sum(logits);
  const int first = warp_reduce(maximum == highest ? pack_of_maximum : last_pack, Smaller());
  if (lane == 0) {
    int column = static_cast<int>(begin);
    if (first < last_pack) {
      const Pack<T, N> pack = packs[first];
      column = first * N;
#pragma unroll
      for (int j = N - 1; j >= 0; --j)
        if (load(pack.values[j]) == highest) column = first * N + j;
    }
    parts.maxima[part] = highest;
    parts.sums[part] = sum;
    parts.logits[part] = logits;
    parts.firsts[part] = column;
  }
}

// The whole row; afterwards every thread may read `parts`.
template <typename T, int N>
__device__ __forceinline__ void row_statistics(const HeadLogits& at, int64_t row, Parts& parts) {
  const T* logits = static_cast<const T*>(at.logits) + row * at.columns;
  const unsigned part = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t width = at.part_width;
  const int64_t begin = part * width < at.columns ? part * width : at.columns;
  const int64_t end = begin + width < at.columns ? begin + width : at.columns;
  if (threadIdx.x == 0) {
    const int64_t label = at.labels[row] - at.first_column;
    parts.label_logit = label >= 0 && label < at.columns ? load(logits[label]) : 0.0f;
  }
  part_statistics<T, N>(logits, begin, end, lane, part, parts);
  __syncthreads();
}

// What all parts say of a row, the same in every thread.
struct Row {
  float maximum, sum, label_logit, own_sum;
  int64_t first_maximum;
};

// From a part's maximum and sum in each lane (-infinity and 0 in lanes without one), and the column of the maximum.
__device__ __forceinline__ Row merge(float maximum, float sum, int64_t column, unsigned lane) {
  Row row;
  row.maximum = warp_reduce(maximum, [](float a, float b) { return fmaxf(a, b); });
  row.sum = warp_sum(maximum == -INFINITY ? sum : sum * exp_from(maximum, row.maximum));
  const unsigned first = warp_reduce(maximum == row.maximum ? lane : kWarp, Smaller());
  row.first_maximum = __shfl_sync(kAllLanes, static_cast<long long>(column), static_cast<int>(first % kWarp));
  return row;
}

__device__ __forceinline__ Row merge_parts(const HeadLogits& at, const Parts& parts) {
  const unsigned lane = threadIdx.x % kWarp;
  const bool there = lane < static_cast<unsigned>(at.parts);
  Row row = merge(there ? parts.maxima[lane] : -INFINITY, there ? parts.sums[lane] : 0.0f,
                  there ? at.first_column + parts.firsts[lane] : 0, lane);
  row.own_sum = warp_sum(there ? parts.logits[lane] : 0.0f);
  row.label_logit = parts.label_logit;
  return row;
}

// From the statistics of all ranks. A part's lane has the column of its rank's maximum: the first part that has the
// row's maximum is one of the first rank that has it.
__device__ __forceinline__ Row merge_ranks(const HeadLogits& at, const float* gathered, int ranks, int64_t number) {
  const unsigned lane = threadIdx.x % kWarp;
  const int64_t size = 2 * at.parts + 3, rank_stride = at.rows * size;
  const float* of_row = gathered + number * size;
  const int rank = static_cast<int>(lane) / at.parts, part = static_cast<int>(lane) % at.parts;
  const bool there = rank < ranks;
  const float* mine = of_row + (there ? rank : 0) * rank_stride;
  Row row = merge(there ? mine[2 * part] : -INFINITY, there ? mine[2 * part + 1] : 0.0f,
                  there ? static_cast<int64_t>(mine[2 * at.parts]) : 0, lane);
  row.label_logit = warp_sum(there && part == 0 ? mine[2 * at.parts + 1] : 0.0f);
  row.own_sum = of_row[at.first_column / at.columns * rank_stride + 2 * at.parts + 2];
  return row;
}

__device__ __forceinline__ void count(int64_t* counter, long long number) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(number));
}

__device__ __forceinline__ bool countable(float value, double unit) {
  return fabs(static_cast<double>(value) * unit) < 4e18;
}

// Losses and counters of a row, by one thread.
__device__ __forceinline__ void write_losses(const HeadLogits& at, const HeadLoss& loss, const Row& row, int64_t number,
                                             float log_z, float log_sum) {
  const int64_t label = at.labels[number];
  float *reported_out = loss.losses + number, *minimised_out = reported_out + at.rows;
  reported_out[2 * at.rows] = row.own_sum;
  if (label == at.ignore_index) {
    *reported_out = *minimised_out = 0.0f;
    return;
  }
  const int64_t source = loss.sources[number];
  const bool counted = source >= 0 && source < loss.num_sources;
  const bool known = counted && label >= 0 && label < at.vocabulary;
  const float reported = known ? log_sum - (row.label_logit - row.maximum) : NAN;
  const float z_term = loss.z_loss * log_z * log_z + loss.max_z_loss * row.maximum * row.maximum;
  *reported_out = reported;
  *minimised_out = reported + z_term;
  if (!counted) return;
  int64_t* counters = loss.counters + source * kHeadCounters;
  count(counters, 1);
  if (countable(reported, loss.loss_unit)) {
    count(counters + 1, llrint(static_cast<double>(reported) * loss.loss_unit));
    if (countable(z_term, kHeadZUnit)) count(counters + 2, llrint(static_cast<double>(z_term) * kHeadZUnit));
    if (row.first_maximum == label) count(counters + 3, 1);
  } else {
    count(counters + 4, 1);
  }
}

// The row's gradient in place of its logits, by the whole block. All threads have passed a barrier since they were read.
template <typename T, int N>
__device__ __forceinline__ void write_gradient(const HeadLogits& at, const HeadLoss& loss, const Row& row,
                                               int64_t number, float log_z) {
  T* logits = static_cast<T*>(at.logits) + number * at.columns;
  auto* packs = reinterpret_cast<Pack<T, N>*>(logits);
  const int64_t label = at.labels[number];
  const float weight = label == at.ignore_index ? 0.0f : loss.weights[number];
  const bool nothing = weight == 0.0f;  // then 0, whatever the logits are
  const float factor = weight * (1.0f + 2.0f * loss.z_loss * log_z) / row.sum;
  const float at_maximum = weight * 2.0f * loss.max_z_loss * row.maximum;
  const int64_t own = label - at.first_column;
  const int64_t first = loss.max_z_loss != 0.0f ? row.first_maximum - at.first_column : -1;
  const int own_pack = own >= 0 && own < at.columns ? static_cast<int>(own / N) : -1;
  const int maximum_pack = first >= 0 && first < at.columns ? static_cast<int>(first / N) : -1;
  const int all = static_cast<int>(at.columns / N), step = static_cast<int>(blockDim.x);
  for (int begin = static_cast<int>(threadIdx.x); begin < all; begin += kGradientUnroll * step) {
    Pack<T, N> loaded[kGradientUnroll];
#pragma unroll
    for (int i = 0; i < kGradientUnroll; ++i)
      if (begin + i * step < all) loaded[i] = packs[begin + i * step];
#pragma unroll
    for (int i = 0; i < kGradientUnroll; ++i) {
      const int at_pack = begin + i * step;
      if (at_pack >= all) continue;
      float values[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = load(loaded[i].values[j]);
        values[j] = nothing ? 0.0f : factor * exp_from(x, row.maximum);
      }
      if (at_pack == own_pack || at_pack == maximum_pack) {  // one or two packs of a row
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (static_cast<int64_t>(at_pack) * N + j == own) values[j] -= weight;
          if (static_cast<int64_t>(at_pack) * N + j == first && !nothing) values[j] += at_maximum;
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) store(loaded[i].values[j], values[j]);
      packs[at_pack] = loaded[i];
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void finish(const HeadLogits& at, const HeadLoss& loss, const Row& row, int64_t number) {
  const float log_sum = logf(row.sum), log_z = row.maximum + log_sum;
  if (threadIdx.x == 0) write_losses(at, loss, row, number, log_z, log_sum);
  if (loss.gradient) write_gradient<T, N>(at, loss, row, number, log_z);
}

template <typename T, int N>
__global__ void __launch_bounds__(kHeadParts* kWarp, 2) statistics(HeadLogits at, float* __restrict__ out) {
  __shared__ Parts parts;
  const int64_t number = blockIdx.x;
  row_statistics<T, N>(at, number, parts);
  float* of_row = out + number * (2 * at.parts + 3);
  if (threadIdx.x < kWarp) {
    const Row row = merge_parts(at, parts);
    const unsigned lane = threadIdx.x;
    if (lane < static_cast<unsigned>(at.parts)) {
      of_row[2 * lane] = parts.maxima[lane];
      of_row[2 * lane + 1] = parts.sums[lane];
    }
    if (lane == 0) {
      of_row[2 * at.parts] = static_cast<float>(row.first_maximum);
      of_row[2 * at.parts + 1] = row.label_logit;
      of_row[2 * at.parts + 2] = row.own_sum;
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kHeadParts* kWarp, 2)
    gradient(HeadLogits at, HeadLoss loss, const float* __restrict__ gathered, int ranks) {
  const int64_t number = blockIdx.x;
  finish<T, N>(at, loss, merge_ranks(at, gathered, ranks, number), number);
}

template <typename T, int N>
__global__ void __launch_bounds__(kHeadParts* kWarp, 2) chunk(HeadLogits at, HeadLoss loss) {
  __shared__ Parts parts;
  const int64_t number = blockIdx.x;
  row_statistics<T, N>(at, number, parts);
  finish<T, N>(at, loss, merge_parts(at, parts), number);
}

constexpr unsigned kGradientThreads = 512;

template <typename T, int N>
int launch_statistics(const HeadLogits& at, float* out, void* stream) {
  HEADRACE_LAUNCH((statistics<T, N>), static_cast<unsigned>(at.rows), static_cast<unsigned>(at.parts) * kWarp, stream,
                  at, out);
  return HEADRACE_LAUNCH_STATUS();
}

template <typename T, int N>
int launch_gradient(const HeadLogits& at, const HeadLoss& loss, const float* gathered, int ranks, void* stream) {
  HEADRACE_LAUNCH((gradient<T, N>), static_cast<unsigned>(at.rows), kGradientThreads, stream, at, loss, gathered,
                  ranks);
  return HEADRACE_LAUNCH_STATUS();
}

template <typename T, int N>
int launch_chunk(const HeadLogits& at, const HeadLoss& loss, void* stream) {
  HEADRACE_LAUNCH((chunk<T, N>), static_cast<unsigned>(at.rows), static_cast<unsigned>(at.parts) * kWarp, stream, at,
                  loss);
  return HEADRACE_LAUNCH_STATUS();
}

// 16-byte packs where rows begin on 16-byte boundaries, single numbers elsewhere.
template <typename T>
bool in_packs(const HeadLogits& at) {
  return packable<T>(at.columns, {at.logits});
}

}  // namespace

int head_statistics_cuda(const HeadLogits& at, float* out, void* stream) {
  if (at.dtype == Dtype::float32)
    return (in_packs<float>(at) ? launch_statistics<float, 4> : launch_statistics<float, 1>)(at, out, stream);
  return (in_packs<__nv_bfloat16>(at) ? launch_statistics<__nv_bfloat16, 8>
                                      : launch_statistics<__nv_bfloat16, 1>)(at, out, stream);
}

int head_gradient_cuda(const HeadLogits& at, const HeadLoss& loss, const float* gathered, int ranks, void* stream) {
  if (at.dtype == Dtype::float32)
    return (in_packs<float>(at) ? launch_gradient<float, 4> : launch_gradient<float, 1>)(at, loss, gathered, ranks,
                                                                                         stream);
  return (in_packs<__nv_bfloat16>(at) ? launch_gradient<__nv_bfloat16, 8>
                                      : launch_gradient<__nv_bfloat16, 1>)(at, loss, gathered, ranks, stream);
}

int head_chunk_cuda(const HeadLogits& at, const HeadLoss& loss, void* stream) {
  if (at.dtype == Dtype::float32)
    return (in_packs<float>(at) ? launch_chunk<float, 4> : launch_chunk<float, 1>)(at, loss, stream);
  return (in_packs<__nv_bfloat16>(at) ? launch_chunk<__nv_bfloat16, 8>
                                      : launch_chunk<__nv_bfloat16, 1>)(at, loss, stream);
}

}  // namespace headrace
