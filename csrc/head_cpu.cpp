// The head's loss on the CPU, row by row: a row stays in the cache from the statistics to the gradient. Mathematics and
// layout: head.h.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu_numbers.h"

namespace headrace {
namespace {

constexpr int kLanes = 16;       // independent maxima and sums: vectors of any width, always the same order
constexpr int64_t kBlock = 512;  // columns that are searched for the row's maximum
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Maximum (NaN are passed over: they show in the sum of exponentials) and sum of x[0, count).
template <typename T>
HEADRACE_INLINE void maximum_and_sum(const T* __restrict x, int64_t count, float& maximum, float& sum) {
  float most[kLanes], sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) most[lane] = -kInfinity, sums[lane] = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = load(x[i + lane]);
      most[lane] = value > most[lane] ? value : most[lane];
      sums[lane] += value;
    }
  for (int lane = 0; i < count; ++i, ++lane) {
    const float value = load(x[i]);
    most[lane] = value > most[lane] ? value : most[lane];
    sums[lane] += value;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) {
      most[lane] = most[lane + half] > most[lane] ? most[lane + half] : most[lane];
      sums[lane] += sums[lane + half];
    }
  maximum = most[0];
  sum = sums[0];
}

template <typename T>
HEADRACE_INLINE int64_t first_equal(const T* x, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i)
    if (load(x[i]) == value) return i;
  return 0;  // all NaN
}

// fp32 logits that become a gradient are replaced by their exponentials, exp(x - maximum of the part), so that these are
// made once: 60 % of the time of a row. bf16 has too few digits for that.
template <typename T>
constexpr bool kKeeps = std::is_same_v<T, float>;

template <typename T, bool keep>
HEADRACE_INLINE void row_statistics(const HeadLogits& at, int64_t row, float* statistics) {
  T* logits = static_cast<T*>(at.logits) + row * at.columns;
  const int64_t label = at.labels[row] - at.first_column;
  float* rest = statistics + 2 * at.parts;
  rest[1] = label >= 0 && label < at.columns ? load(logits[label]) : 0.0f;
  float row_maximum = -kInfinity, row_sum = 0.0f;
  int64_t first_maximum = 0;
  for (int part = 0; part < at.parts; ++part) {
    const int64_t begin = std::min(part * at.part_width, at.columns);
    const int64_t end = std::min(begin + at.part_width, at.columns);
    float maximum = -kInfinity;
    int64_t block_of_maximum = begin;
    for (int64_t block = begin; block < end; block += kBlock) {
      float block_maximum, block_sum;
      maximum_and_sum(logits + block, std::min(kBlock, end - block), block_maximum, block_sum);
      row_sum += block_sum;
      if (block_maximum > maximum) maximum = block_maximum, block_of_maximum = block;
    }
    if (maximum > row_maximum) {
      row_maximum = maximum;
      const int64_t searched = std::min(kBlock, end - block_of_maximum);
      first_maximum = block_of_maximum + first_equal(logits + block_of_maximum, searched, maximum);
    }
    // A part may hold nothing, or -infinity only: 0 then, and no NaN from the difference of infinities.
    const float from = maximum == -kInfinity ? 0.0f : maximum;
    T* x = logits + begin;
    if constexpr (keep)
      for (int64_t i = 0; i < end - begin; ++i) x[i] = exp(x[i] - from);
    statistics[2 * part] = maximum;
    statistics[2 * part + 1] = sum(end - begin, [=](int64_t i) HEADRACE_INLINE_LAMBDA {
      return keep ? load(x[i]) : exp(load(x[i]) - from);
    });
  }
  rest[0] = static_cast<float>(at.first_column + first_maximum);
  rest[2] = row_sum;
}

// What all ranks' statistics say of a row.
struct Row {
  float maximum, sum, label_logit, own_sum;  // sum: of exp(x - maximum)
  int64_t first_maximum;                     // column in the whole vocabulary
};

HEADRACE_INLINE Row merge(const HeadLogits& at, const float* gathered, int64_t rank_stride, int ranks) {
  Row row{-kInfinity, 0.0f, 0.0f, 0.0f, 0};
  const int own = static_cast<int>(at.first_column / at.columns);
  for (int rank = 0; rank < ranks; ++rank) {
    const float* statistics = gathered + rank * rank_stride;
    const float* rest = statistics + 2 * at.parts;
    float maximum = -kInfinity;
    for (int part = 0; part < at.parts; ++part) maximum = std::max(maximum, statistics[2 * part]);
    if (rank == 0 || maximum > row.maximum) row.maximum = maximum, row.first_maximum = static_cast<int64_t>(rest[0]);
    row.label_logit += rest[1];
    if (rank == own) row.own_sum = rest[2];
  }
  for (int rank = 0; rank < ranks; ++rank)
    for (int part = 0; part < at.parts; ++part) {
      const float* of_part = gathered + rank * rank_stride + 2 * part;
      row.sum += of_part[1] * (of_part[0] == -kInfinity ? 0.0f : exp(of_part[0] - row.maximum));
    }
  return row;
}

void count(int64_t& counter, int64_t number) { __atomic_fetch_add(&counter, number, __ATOMIC_RELAXED); }

int64_t fixed_point(float value, double unit) { return std::llrint(static_cast<double>(value) * unit); }

// Whether a sum of such numbers has room in 63 bits; what has not counts as not finite.
bool countable(float value, double unit) { return std::fabs(static_cast<double>(value) * unit) < 4e18; }

template <typename T>
HEADRACE_INLINE void gradient_row(T* __restrict logits, int64_t count, float maximum, float factor) {
  for (int64_t i = 0; i < count; ++i) store(logits[i], factor * exp(load(logits[i]) - maximum));
}

// `kept`: the row's statistics, where it holds exponentials by now.
template <typename T>
HEADRACE_INLINE void finish(const HeadLogits& at, const HeadLoss& loss, const Row& row, int64_t number,
                            const float* kept) {
  T* logits = static_cast<T*>(at.logits) + number * at.columns;
  const int64_t label = at.labels[number];
  float *reported_out = loss.losses + number, *minimised_out = reported_out + at.rows;
  reported_out[2 * at.rows] = row.own_sum;
  const float weight = loss.weights[number];
  if (label == at.ignore_index || (loss.gradient && weight == 0.0f))
    if (loss.gradient) std::fill_n(reinterpret_cast<char*>(logits), at.columns * sizeof(T), char{0});
  if (label == at.ignore_index) {
    *reported_out = *minimised_out = 0.0f;
    return;
  }
  const int64_t source = loss.sources[number];
  const bool known = label >= 0 && label < at.vocabulary && source >= 0 && source < loss.num_sources;
  const float log_sum = std::log(row.sum), log_z = row.maximum + log_sum;
  const float reported = known ? log_sum - (row.label_logit - row.maximum) : std::numeric_limits<float>::quiet_NaN();
  const float z_term = loss.z_loss * log_z * log_z + loss.max_z_loss * row.maximum * row.maximum;
  *reported_out = reported;
  *minimised_out = reported + z_term;
  if (source >= 0 && source < loss.num_sources) {
    int64_t* counters = loss.counters + source * kHeadCounters;
    count(counters[0], 1);
    if (countable(reported, loss.loss_unit)) {
      count(counters[1], fixed_point(reported, loss.loss_unit));
      if (countable(z_term, kHeadZUnit)) count(counters[2], fixed_point(z_term, kHeadZUnit));
      count(counters[3], row.first_maximum == label);
    } else {
      count(counters[4], 1);
    }
  }
  if (!loss.gradient || weight == 0.0f) return;
  const float factor = weight * (1.0f + 2.0f * loss.z_loss * log_z) / row.sum;
  if (kept == nullptr) {
    gradient_row(logits, at.columns, row.maximum, factor);
  } else if constexpr (kKeeps<T>) {
    for (int part = 0; part < at.parts; ++part) {
      const int64_t begin = std::min(part * at.part_width, at.columns);
      const int64_t end = std::min(begin + at.part_width, at.columns);
      const float scale = kept[2 * part] == -kInfinity ? 0.0f : exp(kept[2 * part] - row.maximum);
      const float of_part = factor * scale;
      for (int64_t i = begin; i < end; ++i) logits[i] *= of_part;
    }
  }
  const float at_maximum = weight * 2.0f * loss.max_z_loss * row.maximum;
  const int64_t first = row.first_maximum - at.first_column, own = label - at.first_column;
  if (loss.max_z_loss != 0.0f && first >= 0 && first < at.columns) store(logits[first], factor + at_maximum);
  if (own >= 0 && own < at.columns) {
    const float both = loss.max_z_loss != 0.0f && first == own ? at_maximum : 0.0f;
    store(logits[own], factor * exp(row.label_logit - row.maximum) + both - weight);
  }
}

template <typename T>
HEADRACE_INLINE void statistics(const HeadLogits& at, float* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) row_statistics<T, false>(at, row, out + row * (2 * at.parts + 3));
}

template <typename T>
HEADRACE_INLINE void gradient(const HeadLogits& at, const HeadLoss& loss, const float* gathered, int ranks, int64_t begin,
                              int64_t end) {
  const int64_t size = 2 * at.parts + 3;
  for (int64_t row = begin; row < end; ++row)
    finish<T>(at, loss, merge(at, gathered + row * size, at.rows * size, ranks), row, nullptr);
}

template <typename T>
HEADRACE_INLINE void chunk(const HeadLogits& at, const HeadLoss& loss, int64_t begin, int64_t end) {
  float found[2 * kMostHeadParts + 3];
  for (int64_t row = begin; row < end; ++row) {
    if (kKeeps<T> && loss.gradient) {
      row_statistics<T, kKeeps<T>>(at, row, found);
      finish<T>(at, loss, merge(at, found, 0, 1), row, found);
    } else {
      row_statistics<T, false>(at, row, found);
      finish<T>(at, loss, merge(at, found, 0, 1), row, nullptr);
    }
  }
}

HEADRACE_FOR_EVERY_CPU
void statistics_float32(const HeadLogits& at, float* out, int64_t begin, int64_t end) {
  statistics<float>(at, out, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void statistics_bfloat16(const HeadLogits& at, float* out, int64_t begin, int64_t end) {
  statistics<BFloat16>(at, out, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void gradient_float32(const HeadLogits& at, const HeadLoss& loss, const float* gathered, int ranks, int64_t begin,
                      int64_t end) {
  gradient<float>(at, loss, gathered, ranks, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void gradient_bfloat16(const HeadLogits& at, const HeadLoss& loss, const float* gathered, int ranks, int64_t begin,
                       int64_t end) {
  gradient<BFloat16>(at, loss, gathered, ranks, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void chunk_float32(const HeadLogits& at, const HeadLoss& loss, int64_t begin, int64_t end) {
  chunk<float>(at, loss, begin, end);
}

HEADRACE_FOR_EVERY_CPU
void chunk_bfloat16(const HeadLogits& at, const HeadLoss& loss, int64_t begin, int64_t end) {
  chunk<BFloat16>(at, loss, begin, end);
}

}  // namespace

void head_statistics_cpu(const HeadLogits& at, float* out, int64_t begin, int64_t end) {
  (at.dtype == Dtype::float32 ? statistics_float32 : statistics_bfloat16)(at, out, begin, end);
}

void head_gradient_cpu(const HeadLogits& at, const HeadLoss& loss, const float* gathered, int ranks, int64_t begin,
                       int64_t end) {
  (at.dtype == Dtype::float32 ? gradient_float32 : gradient_bfloat16)(at, loss, gathered, ranks, begin, end);
}

void head_chunk_cpu(const HeadLogits& at, const HeadLoss& loss, int64_t begin, int64_t end) {
  (at.dtype == Dtype::float32 ? chunk_float32 : chunk_bfloat16)(at, loss, begin, end);
}

}  // namespace headrace
