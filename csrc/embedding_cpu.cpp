// Gradient of an embedding's table on the CPU. Mathematics and layout: embedding.h.
#include "embedding.h"

#include <algorithm>

#include "cpu_numbers.h"

namespace headrace {
namespace {

constexpr int64_t kStrip = 256;  // columns summed at a time: 1 KB of sums beside 1 KB of a row, in the nearest cache

// Sum over a run's places, columns [0, count), into `total`.
template <typename T>
HEADRACE_INLINE void sum_run(const T* grad, const int64_t* order, int64_t run, int64_t width, int64_t count,
                             float* __restrict total) {
  float segment[kStrip];
  for (int64_t start = 0; start < run; start += kEmbeddingSegment) {
    const int64_t end = std::min(run, start + kEmbeddingSegment);
    float* __restrict sums = start == 0 ? total : segment;
    const T* __restrict first = grad + order[start] * width;
    for (int64_t i = 0; i < count; ++i) sums[i] = load(first[i]);
    for (int64_t place = start + 1; place < end; ++place) {
      const T* __restrict row = grad + order[place] * width;
      for (int64_t i = 0; i < count; ++i) sums[i] += load(row[i]);
    }
    if (start > 0)
      for (int64_t i = 0; i < count; ++i) total[i] += segment[i];
  }
}

template <typename T, bool kAdd>
HEADRACE_INLINE void gradient(const void* grad, const int64_t* tokens, const int64_t* order, void* table,
                              int64_t places, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  while (begin < end && begin > 0 && tokens[begin] == tokens[begin - 1]) ++begin;  // another's, who walks past its end
  while (begin < end) {
    const int64_t token = tokens[begin];
    int64_t stop = begin + 1;
    while (stop < places && tokens[stop] == token) ++stop;
    if (token >= 0 && token < rows) {
      for (int64_t column = 0; column < width; column += kStrip) {
        const int64_t count = std::min(kStrip, width - column);
        float total[kStrip];
        sum_run(static_cast<const T*>(grad) + column, order + begin, stop - begin, width, count, total);
        if (kAdd) {
          float* __restrict out = static_cast<float*>(table) + token * width + column;
          for (int64_t i = 0; i < count; ++i) out[i] += total[i];
        } else {
          T* __restrict out = static_cast<T*>(table) + token * width + column;
          for (int64_t i = 0; i < count; ++i) store(out[i], total[i]);
        }
      }
    }
    begin = stop;
  }
}

#define HEADRACE_EMBEDDING(name, T, kAdd)                                                                             \
  HEADRACE_FOR_EVERY_CPU void name(const void* grad, const int64_t* tokens, const int64_t* order, void* table,        \
                                   int64_t places, int64_t rows, int64_t width, int64_t begin, int64_t end) {         \
    gradient<T, kAdd>(grad, tokens, order, table, places, rows, width, begin, end);                                   \
  }

HEADRACE_EMBEDDING(add_float32, float, true)
HEADRACE_EMBEDDING(add_bfloat16, BFloat16, true)
HEADRACE_EMBEDDING(write_float32, float, false)
HEADRACE_EMBEDDING(write_bfloat16, BFloat16, false)

}  // namespace

void embedding_gradient_cpu(Dtype dtype, bool add, const void* grad, const int64_t* tokens, const int64_t* order,
                            void* table, int64_t places, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  const auto run =
      dtype == Dtype::float32 ? (add ? add_float32 : write_float32) : (add ? add_bfloat16 : write_bfloat16);
  run(grad, tokens, order, table, places, rows, width, begin, end);
}

}  // namespace headrace
