// Norm and rotary embedding of queries and keys on the GPU: one pass over memory. Mathematics and layout: qk_norm_rope.h.
//
// A head has two halves, whose numbers are turned in pairs. A team of lanes has one head, and each lane the same places
// of both halves, so that only the norm's sums go between lanes: 4 lanes for a head of 64 bf16 numbers, 8 for 128.
#include "qk_norm_rope.h"

#include "device.cuh"

namespace headrace {
namespace {

constexpr unsigned kThreads = 128;

#ifndef HEADRACE_QK_MOST_PARTS  // tests lower it: what fits on a small machine fills no block twice
#define HEADRACE_QK_MOST_PARTS 1056
#endif
constexpr int64_t kMostParts = HEADRACE_QK_MOST_PARTS;  // blocks of the backward pass: 8 for each SM of an H200

// How lanes share a head: kTeam lanes, each with kSteps packs of kPack numbers of the first half, and of the second.
template <typename Number, int kPackNumbers, int kTeamLanes, int kPacks>
struct Team {
  using T = Number;
  static constexpr int kPack = kPackNumbers, kLanes = kTeamLanes, kSteps = kPacks, kCount = kPack * kSteps;
  static constexpr unsigned kTeams = kThreads / kLanes;  // of a block

  static __device__ __forceinline__ unsigned index() { return threadIdx.x / kLanes; }
  static __device__ __forceinline__ int place(int step) {
    return (step * kLanes + static_cast<int>(threadIdx.x % kLanes)) * kPack;
  }

  // This lane's numbers of a row of `size`; 0 past the end.
  static __device__ __forceinline__ void load_row(const T* row, int size, float (&to)[kCount]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Pack<T, kPack> pack;
      if (place(step) < size) pack = *reinterpret_cast<const Pack<T, kPack>*>(row + place(step));
#pragma unroll
      for (int i = 0; i < kPack; ++i) to[step * kPack + i] = place(step) < size ? load(pack.values[i]) : 0.0f;
    }
  }

  // Writes numbers of a row and leaves them rounded to T.
  static __device__ __forceinline__ void store_row(T* row, int size, float (&from)[kCount]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (place(step) >= size) continue;
      Pack<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        store(pack.values[i], from[step * kPack + i]);
        from[step * kPack + i] = load(pack.values[i]);
      }
      *reinterpret_cast<Pack<T, kPack>*>(row + place(step)) = pack;
    }
  }

  static __device__ __forceinline__ void fill(float (&x)[kCount], float value) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = value;
  }

  // Sum over the lanes of each team. The whole warp must call it.
  static __device__ __forceinline__ float sum(float x) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
  }

  // The row of cos and sin for a token; NaN where the tables have none.
  static __device__ __forceinline__ void load_angles(const QkInput& input, int64_t token, int half,
                                                     float (&cos)[kCount], float (&sin)[kCount]) {
    const int64_t row = input.positions_are_int64 ? static_cast<const int64_t*>(input.positions)[token]
                                                  : static_cast<const int32_t*>(input.positions)[token];
    if (row < 0 || row >= input.table_rows) {
      fill(cos, NAN);
      fill(sin, NAN);
      return;
    }
    load_row(static_cast<const T*>(input.cos) + row * half, half, cos);
    load_row(static_cast<const T*>(input.sin) + row * half, half, sin);
  }
};

template <typename Team>
__global__ void __launch_bounds__(kThreads) forward(const QkForward pass, unsigned heads) {
  using T = typename Team::T;
  constexpr int kCount = Team::kCount;
  const QkInput& input = pass.input;
  const auto queries = static_cast<unsigned>(input.shape.queries_per_group);
  const int size = static_cast<int>(input.shape.head_size), half = size / 2, kind = input.statistics_per_head;
  const unsigned head = blockIdx.x * Team::kTeams + Team::index();
  const bool active = head < heads;  // the others stay for the sums
  const unsigned group = head / (queries + 1), slot = head - group * (queries + 1);
  const int row_end = active ? half : 0;

  float a[kCount], b[kCount];
  const T* in = static_cast<const T*>(input.qkv) + (static_cast<int64_t>(group) * (queries + 2) + slot) * size;
  Team::load_row(in, row_end, a);
  Team::load_row(in + half, row_end, b);
  float cos[kCount], sin[kCount];
  Team::fill(cos, 0.0f);
  Team::fill(sin, 0.0f);
  if (active) Team::load_angles(input, group / static_cast<unsigned>(input.shape.groups), half, cos, sin);

  float mean = 0.0f, scale = 1.0f;
  if (kind == 2) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += a[i] + b[i];
    mean = Team::sum(total) / size;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = Team::place(i / Team::kPack) < row_end;
      a[i] = inside ? a[i] - mean : 0.0f;
      b[i] = inside ? b[i] - mean : 0.0f;
    }
  }
  if (kind > 0) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += a[i] * a[i] + b[i] * b[i];
    scale = 1.0f / sqrtf(Team::sum(total) / size + pass.eps);
    if (active && threadIdx.x % Team::kLanes == 0) {
      float* statistics = pass.statistics + static_cast<int64_t>(head) * kind;
      if (kind == 2) statistics[0] = mean;
      statistics[kind - 1] = scale;
    }
    const bool is_key = slot == queries;
    const T* weight = static_cast<const T*>(is_key ? input.key_weight : input.query_weight);
    float weight_a[kCount], weight_b[kCount];
    Team::load_row(weight, half, weight_a);
    Team::load_row(weight + half, half, weight_b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      a[i] = a[i] * scale * weight_a[i];
      b[i] = b[i] * scale * weight_b[i];
    }
    if (kind == 2) {
      const T* bias = static_cast<const T*>(is_key ? input.key_bias : input.query_bias);
      Team::load_row(bias, half, weight_a);
      Team::load_row(bias + half, half, weight_b);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        a[i] += weight_a[i];
        b[i] += weight_b[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float first = a[i] * cos[i] - b[i] * sin[i];
    b[i] = b[i] * cos[i] + a[i] * sin[i];
    a[i] = first;
  }
  T* out = slot == queries ? static_cast<T*>(pass.key) + static_cast<int64_t>(group) * size
                           : static_cast<T*>(pass.query) + (static_cast<int64_t>(group) * queries + slot) * size;
  Team::store_row(out, row_end, a);
  Team::store_row(out + half, row_end, b);
  if (pass.lengths != nullptr) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      total += Team::place(i / Team::kPack) < row_end ? a[i] * a[i] + b[i] * b[i] : 0.0f;
    total = Team::sum(total);
    if (active && threadIdx.x % Team::kLanes == 0) pass.lengths[head] = sqrtf(total);
  }
}

// Blocks of the backward pass that have queries, keys and values. The first two kinds are its parts.
struct Blocks {
  unsigned queries, keys, values;
};

// Adds up what the teams of a block have in x, of the first half and the second: to[size] in shared memory.
template <typename Team>
__device__ __forceinline__ void add_up(float (&x)[Team::kCount], float (&y)[Team::kCount], float* to, int half) {
#pragma unroll
  for (int i = 0; i < Team::kCount; ++i) {
#pragma unroll
    for (int distance = Team::kLanes; distance < static_cast<int>(kWarp); distance *= 2) {
      x[i] += __shfl_xor_sync(kAllLanes, x[i], distance);
      y[i] += __shfl_xor_sync(kAllLanes, y[i], distance);
    }
  }
  for (unsigned warp = 0; warp < kThreads / kWarp; ++warp) {  // one after the other: a fixed order
    if (threadIdx.x / kWarp == warp && threadIdx.x % kWarp < Team::kLanes) {
#pragma unroll
      for (int i = 0; i < Team::kCount; ++i) {
        const int place = Team::place(i / Team::kPack) + i % Team::kPack;
        if (place >= half) continue;
        to[place] = warp == 0 ? x[i] : to[place] + x[i];
        to[place + half] = warp == 0 ? y[i] : to[place + half] + y[i];
      }
    }
    __syncthreads();
  }
}

// kKind: statistics of a head. With fewer blocks on a multiprocessor too few loads would be under way. That leaves 128
// registers (170 for LayerNorm, which sums twice as much), so weights are read again for each head, from the nearest cache.
template <typename Team, int kKind>
__global__ void __launch_bounds__(kThreads, kKind == 2 ? 3 : 4) backward(const QkBackward pass, const Blocks blocks) {
  using T = typename Team::T;
  constexpr int kCount = Team::kCount;
  const QkInput& input = pass.input;
  const auto queries = static_cast<unsigned>(input.shape.queries_per_group);
  const auto groups = static_cast<unsigned>(input.shape.tokens * input.shape.groups);  // of all tokens
  const int size = static_cast<int>(input.shape.head_size), half = size / 2;
  unsigned block = blockIdx.x, stride = blocks.queries, heads = groups * queries, slot = 0;
  const void* grads = pass.grad_query;
  const bool is_query = block < blocks.queries, is_value = block >= blocks.queries + blocks.keys;
  if (!is_query) {
    const bool is_key = !is_value;
    block -= is_key ? blocks.queries : blocks.queries + blocks.keys;
    stride = is_key ? blocks.keys : blocks.values;
    heads = groups;
    slot = is_key ? queries : queries + 1;
    grads = is_key ? pass.grad_key : pass.grad_value;
  }
  [[maybe_unused]] float grad_weight_a[kCount], grad_weight_b[kCount], grad_bias_a[kCount], grad_bias_b[kCount];
  if constexpr (kKind > 0) {
    Team::fill(grad_weight_a, 0.0f);
    Team::fill(grad_weight_b, 0.0f);
    Team::fill(grad_bias_a, 0.0f);
    Team::fill(grad_bias_b, 0.0f);
  }
  for (unsigned first = block * Team::kTeams; first < heads; first += stride * Team::kTeams) {
    const unsigned head = first + Team::index();
    const bool active = head < heads;  // the others stay for the sums
    const int row_end = active ? half : 0;
    const unsigned group = is_query ? head / queries : head;
    if (is_query) slot = head - group * queries;
    float a[kCount], b[kCount];
    const T* grad = static_cast<const T*>(grads) + static_cast<int64_t>(head) * size;
    Team::load_row(grad, row_end, a);
    Team::load_row(grad + half, row_end, b);
    const int64_t row = (static_cast<int64_t>(group) * (queries + 2) + slot) * size;
    if (!is_value) {
      float cos[kCount], sin[kCount];
      Team::fill(cos, 0.0f);
      Team::fill(sin, 0.0f);
      if (active) Team::load_angles(input, group / static_cast<unsigned>(input.shape.groups), half, cos, sin);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float turned = a[i] * cos[i] + b[i] * sin[i];
        b[i] = b[i] * cos[i] - a[i] * sin[i];
        a[i] = turned;
      }
    }
    if constexpr (kKind > 0) {
      if (!is_value) {
        float x[kCount], y[kCount], mean = 0.0f, scale = 0.0f;
        const T* in = static_cast<const T*>(input.qkv) + row;
        Team::load_row(in, row_end, x);
        Team::load_row(in + half, row_end, y);
        if (active) {
          const float* statistics =
              pass.statistics + (static_cast<int64_t>(group) * (queries + 1) + slot) * kKind;
          if constexpr (kKind == 2) mean = statistics[0];
          scale = statistics[kKind - 1];
        }
        float weight_a[kCount], weight_b[kCount], along = 0.0f, shift = 0.0f;
        const T* weight = static_cast<const T*>(is_query ? input.query_weight : input.key_weight);
        Team::load_row(weight, half, weight_a);
        Team::load_row(weight + half, half, weight_b);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const bool inside = Team::place(i / Team::kPack) < row_end;
          x[i] = inside ? (x[i] - mean) * scale : 0.0f;
          y[i] = inside ? (y[i] - mean) * scale : 0.0f;
          grad_weight_a[i] += a[i] * x[i];
          grad_weight_b[i] += b[i] * y[i];
          if constexpr (kKind == 2) {
            grad_bias_a[i] += a[i];
            grad_bias_b[i] += b[i];
          }
          a[i] *= weight_a[i];
          b[i] *= weight_b[i];
          along += a[i] * x[i] + b[i] * y[i];
          shift += a[i] + b[i];
        }
        along = Team::sum(along) / size;
        shift = kKind == 2 ? Team::sum(shift) / size : 0.0f;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          a[i] = scale * (a[i] - shift - x[i] * along);
          b[i] = scale * (b[i] - shift - y[i] * along);
        }
      }
    }
    T* out = static_cast<T*>(pass.grad_qkv) + row;
    Team::store_row(out, row_end, a);
    Team::store_row(out + half, row_end, b);
  }
  if constexpr (kKind > 0) {
    if (is_value) return;  // the whole block
    __shared__ float sums[kKind * kQkMaxCudaHeadSize];
    add_up<Team>(grad_weight_a, grad_weight_b, sums, half);
    if constexpr (kKind == 2) add_up<Team>(grad_bias_a, grad_bias_b, sums + size, half);
    float* part = pass.partials + static_cast<int64_t>(blockIdx.x) * kKind * size;
    for (int i = static_cast<int>(threadIdx.x); i < kKind * size; i += kThreads) part[i] = sums[i];
  }
}

constexpr unsigned kSumThreads = 1024;

// grad_weights[2, count] of partials[query_parts + key_parts, count]. A block has 32 columns of one of the two; each of
// its warps adds up every 32nd part, then these sums are added in order.
__global__ void __launch_bounds__(kSumThreads)
    sum_parts(const float* __restrict__ partials, float* __restrict__ grad_weights, unsigned query_parts,
              unsigned key_parts, unsigned count) {
  __shared__ float sums[kWarp][kWarp + 1];
  const unsigned columns = (count + kWarp - 1) / kWarp, is_key = blockIdx.x / columns;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned column = blockIdx.x % columns * kWarp + lane;
  const unsigned parts = is_key ? key_parts : query_parts;
  const float* from = partials + static_cast<int64_t>(is_key ? query_parts : 0) * count + column;
  float total = 0.0f;
  if (column < count)
    for (unsigned part = warp; part < parts; part += kWarp) total += from[static_cast<int64_t>(part) * count];
  sums[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || column >= count) return;
  total = 0.0f;
  for (unsigned each = 0; each < kWarp; ++each) total += sums[each][lane];
  grad_weights[static_cast<int64_t>(is_key) * count + column] = total;
}

int64_t blocks_for(int64_t heads, int64_t most) { return std::clamp<int64_t>((heads + 7) / 8, 1, most); }

// In proportion to the heads there are. A block takes 8 heads at least.
Blocks blocks_of(const QkvShape& shape) {
  const int64_t groups = shape.tokens * shape.groups, each = std::max<int64_t>(1, kMostParts / (shape.queries_per_group + 2));
  const auto singles = static_cast<unsigned>(blocks_for(groups, each));
  return {static_cast<unsigned>(blocks_for(groups * shape.queries_per_group, each * shape.queries_per_group)), singles,
          singles};
}

// Calls run with the Team for heads of this size: 16-byte packs where halves and tensors begin on 16-byte boundaries and
// a warp is enough for a head, single numbers elsewhere.
template <typename T, typename Run>
int with_team(const QkInput& input, std::initializer_list<const void*> tensors, const Run& run) {
  constexpr int kPack = kPackSize<T>;
  const int64_t half = input.shape.head_size / 2, lanes = half / kPack;
  const bool packs = packable<T>(half, tensors) && packable<T>(half, {input.qkv, input.cos, input.sin}) &&
                     packable<T>(half, {input.query_weight, input.key_weight, input.query_bias, input.key_bias});
  if (!packs || lanes > 32) return run(Team<T, 1, 32, kQkMaxCudaHeadSize / 2 / 32>());
  if (lanes <= 4) return run(Team<T, kPack, 4, 1>());
  if (lanes <= 8) return run(Team<T, kPack, 8, 1>());
  if (lanes <= 16) return run(Team<T, kPack, 16, 1>());
  return run(Team<T, kPack, 32, 1>());
}

template <typename T>
int forward_of(const QkForward& pass, void* stream) {
  const QkvShape& shape = pass.input.shape;
  const auto heads = static_cast<unsigned>(shape.tokens * shape.groups * (shape.queries_per_group + 1));
  if (heads == 0) return 0;
  return with_team<T>(pass.input, {pass.query, pass.key}, [&](auto team) {
    using Team = decltype(team);
    HEADRACE_LAUNCH((forward<Team>), (heads + Team::kTeams - 1) / Team::kTeams, kThreads, stream, pass, heads);
    return HEADRACE_LAUNCH_STATUS();
  });
}

template <typename T>
int backward_of(const QkBackward& pass, void* stream) {
  const Blocks blocks = blocks_of(pass.input.shape);
  const unsigned all = blocks.queries + blocks.keys + blocks.values;
  return with_team<T>(pass.input, {pass.grad_query, pass.grad_key, pass.grad_value, pass.grad_qkv}, [&](auto team) {
    using Team = decltype(team);
    if (pass.input.statistics_per_head == 0) HEADRACE_LAUNCH((backward<Team, 0>), all, kThreads, stream, pass, blocks);
    if (pass.input.statistics_per_head == 1) HEADRACE_LAUNCH((backward<Team, 1>), all, kThreads, stream, pass, blocks);
    if (pass.input.statistics_per_head == 2) HEADRACE_LAUNCH((backward<Team, 2>), all, kThreads, stream, pass, blocks);
    return HEADRACE_LAUNCH_STATUS();
  });
}

}  // namespace

int64_t qk_norm_rope_parts_cuda(const QkvShape& shape) {
  const Blocks blocks = blocks_of(shape);
  return blocks.queries + blocks.keys;
}

int qk_norm_rope_forward_cuda(const QkForward& pass, void* stream) {
  return pass.input.dtype == Dtype::float32 ? forward_of<float>(pass, stream) : forward_of<__nv_bfloat16>(pass, stream);
}

int qk_norm_rope_backward_cuda(const QkBackward& pass, void* stream) {
  const auto run = pass.input.dtype == Dtype::float32 ? backward_of<float> : backward_of<__nv_bfloat16>;
  if (const int error = run(pass, stream)) return error;
  const auto count = static_cast<unsigned>(pass.input.statistics_per_head * pass.input.shape.head_size);
  if (count == 0) return 0;
  const Blocks blocks = blocks_of(pass.input.shape);
  HEADRACE_LAUNCH(sum_parts, 2 * ((count + kWarp - 1) / kWarp), kSumThreads, stream, pass.partials, pass.grad_weights,
                  blocks.queries, blocks.keys, count);
  return HEADRACE_LAUNCH_STATUS();
}

}  // namespace headrace
