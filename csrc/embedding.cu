// Gradient of an embedding's table on the GPU: a block for each place that begins a segment of a run, then one for each
// run of more than one segment. Which those are blocks find out from the sorted tokens, so the host need not know how
// many there are. Mathematics and layout: embedding.h.
#include "embedding.h"

#include "device.cuh"

namespace headrace {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kSegment = kEmbeddingSegment;

// First of the sorted places [begin, end) whose token is at least `token`; `end` if there is none.
__device__ __forceinline__ unsigned first_at_least(const int64_t* __restrict__ tokens, unsigned begin, unsigned end,
                                                   int64_t token) {
  while (begin < end) {
    const unsigned middle = begin + (end - begin) / 2;
    if (tokens[middle] < token)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

template <int N>
__device__ __forceinline__ void load_floats(const float* __restrict__ from, float (&values)[N]) {
  constexpr int kSize = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kSize) {
    const Pack<float, kSize> pack = *reinterpret_cast<const Pack<float, kSize>*>(from + i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[i + j] = pack.values[j];
  }
}

template <int N>
__device__ __forceinline__ void store_floats(float* __restrict__ to, const float (&values)[N]) {
  constexpr int kSize = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kSize) {
    Pack<float, kSize> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) pack.values[j] = values[i + j];
    *reinterpret_cast<Pack<float, kSize>*>(to + i) = pack;
  }
}

// Adds `sums` to a float32 table, or writes them to one of type T; `at` is in numbers.
template <typename T, int N, bool kAdd>
__device__ __forceinline__ void put(void* __restrict__ table, int64_t at, const float (&sums)[N]) {
  if constexpr (kAdd) {
    float* const to = static_cast<float*>(table) + at;
    float values[N];
    load_floats<N>(to, values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += sums[i];
    store_floats<N>(to, values);
  } else {
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) store(out.values[i], sums[i]);
    *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(table) + at) = out;
  }
}

// The row of `partial` for the segment that begins at `place`, which is or is not its run's first.
__device__ __forceinline__ int64_t partial_row(unsigned place, bool first) {
  return 2 * static_cast<int64_t>(place / kSegment) + (first ? 1 : 0);
}

template <typename T, int N, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    sum_segments(const Pack<T, N>* __restrict__ grad, const int64_t* __restrict__ tokens,
                 const int64_t* __restrict__ order, void* __restrict__ table, float* __restrict__ partial,
                 unsigned places, int64_t rows, unsigned row_packs) {
  const unsigned begin = blockIdx.x;
  const int64_t token = tokens[begin];
  if (token < 0 || token >= rows) return;
  const bool first = begin == 0 || tokens[begin - 1] != token;
  if (!first) {
    // Later segments begin kSegment places after the one before; most blocks go here, after three loads.
    if (begin < kSegment || tokens[begin - kSegment] != token) return;
    if ((begin - first_at_least(tokens, 0, begin, token)) % kSegment != 0) return;
  }
  const unsigned limit = begin + kSegment < places ? begin + kSegment : places;
  const unsigned end = first_at_least(tokens, begin + 1, limit, token + 1);
  const bool whole = first && (end == places || tokens[end] != token);
  const int64_t to = (whole ? token : partial_row(begin, first)) * row_packs;
  for (unsigned pack = threadIdx.x; pack < row_packs; pack += kThreads) {
    float sums[N];
    const Pack<T, N> start = grad[order[begin] * row_packs + pack];
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = load(start.values[i]);
#pragma unroll 4  // rows are far apart: four loads on their way at a time
    for (unsigned place = begin + 1; place < end; ++place) {
      const Pack<T, N> row = grad[order[place] * row_packs + pack];
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += load(row.values[i]);
    }
    if (whole)
      put<T, N, kAdd>(table, (to + pack) * N, sums);
    else
      store_floats<N>(partial + (to + pack) * N, sums);
  }
}

// A block for each kSegment places. A run of more than one segment is longer than that, so at most one begins there.
template <typename T, int N, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    add_segments(const int64_t* __restrict__ tokens, const float* __restrict__ partial, void* __restrict__ table,
                 unsigned places, int64_t rows, unsigned row_packs) {
  __shared__ unsigned found;
  if (threadIdx.x == 0) found = places;
  __syncthreads();
  const unsigned place = blockIdx.x * kSegment + threadIdx.x;
  if (threadIdx.x < kSegment && place + kSegment < places) {
    const int64_t token = tokens[place];
    const bool first = place == 0 || tokens[place - 1] != token;
    if (first && tokens[place + kSegment] == token && token >= 0 && token < rows) found = place;
  }
  __syncthreads();
  const unsigned begin = found;
  if (begin == places) return;
  const int64_t token = tokens[begin];
  const unsigned end = first_at_least(tokens, begin + kSegment, places, token + 1);
  for (unsigned pack = threadIdx.x; pack < row_packs; pack += kThreads) {
    float sums[N];
    load_floats<N>(partial + (partial_row(begin, true) * row_packs + pack) * N, sums);
#pragma unroll 4
    for (unsigned segment = begin + kSegment; segment < end; segment += kSegment) {
      float more[N];
      load_floats<N>(partial + (partial_row(segment, false) * row_packs + pack) * N, more);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += more[i];
    }
    put<T, N, kAdd>(table, (token * row_packs + pack) * N, sums);
  }
}

template <typename T, int N, bool kAdd>
int launch(const void* grad, const int64_t* tokens, const int64_t* order, void* table, float* partial, int64_t places,
           int64_t rows, int64_t width, void* stream) {
  const auto count = static_cast<unsigned>(places), row_packs = static_cast<unsigned>(width / N);
  HEADRACE_LAUNCH((sum_segments<T, N, kAdd>), count, kThreads, stream, static_cast<const Pack<T, N>*>(grad), tokens,
                  order, table, partial, count, rows, row_packs);
  if (const int error = HEADRACE_LAUNCH_STATUS()) return error;
  if (count <= kSegment) return 0;
  HEADRACE_LAUNCH((add_segments<T, N, kAdd>), (count + kSegment - 1) / kSegment, kThreads, stream, tokens, partial,
                  table, count, rows, row_packs);
  return HEADRACE_LAUNCH_STATUS();
}

// 16-byte packs where rows and tensors begin on 16-byte boundaries, single numbers elsewhere.
template <typename T, bool kAdd>
int gradient(const void* grad, const int64_t* tokens, const int64_t* order, void* table, float* partial,
             int64_t places, int64_t rows, int64_t width, void* stream) {
  const auto run = packable<T>(width, {grad, table, partial}) ? launch<T, kPackSize<T>, kAdd> : launch<T, 1, kAdd>;
  return run(grad, tokens, order, table, partial, places, rows, width, stream);
}

}  // namespace

int embedding_gradient_cuda(Dtype dtype, bool add, const void* grad, const int64_t* tokens, const int64_t* order,
                            void* table, float* partial, int64_t places, int64_t rows, int64_t width, void* stream) {
  const auto run = dtype == Dtype::float32 ? (add ? gradient<float, true> : gradient<float, false>)
                                           : (add ? gradient<__nv_bfloat16, true> : gradient<__nv_bfloat16, false>);
  return run(grad, tokens, order, table, partial, places, rows, width, stream);
}

}  // namespace headrace
