#include "rows.h"

#include "device.cuh"

namespace headrace {
namespace {

constexpr unsigned kThreads = 96;

// A block takes a row, and keeps it in dynamic shared memory since threads read what other threads have overwritten.
__global__ void __launch_bounds__(kThreads) turn(float* x, float* largest, unsigned long long* found, unsigned width) {
  HEADRACE_DYNAMIC_SHARED(float, row);
  __shared__ unsigned above[kThreads / kWarp];
  float* const own = x + static_cast<int64_t>(blockIdx.x) * width;
  float sum = 0.0f;
  unsigned large = 0;
  for (unsigned start = 0; start < width; start += kThreads) {
    const unsigned i = start + threadIdx.x;
    const float value = i < width ? own[i] : 0.0f;
    if (i < width) row[i] = value;
    sum += value;
    large += __popc(__ballot_sync(kAllLanes, value > 1.0f));
  }
  if (threadIdx.x % kWarp == 0) above[threadIdx.x / kWarp] = large;
  const float mean = block_sum(sum) / static_cast<float>(width);
  float squares = 0.0f, most = 0.0f;
  for (unsigned i = threadIdx.x; i < width; i += kThreads) {
    squares += (row[i] - mean) * (row[i] - mean);
    most = larger(most, fabsf(row[i] - mean));
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(width));
  most = block_max(most);
  if (threadIdx.x == 0) {
    unsigned long long all = 0, some = 0;
    for (const unsigned each : above) {
      all += each;
      some += each != 0;
    }
    atomicAdd(&found[0], all);
    atomicAdd(&found[1], some);
    largest[blockIdx.x] = most;
  }
  for (unsigned i = threadIdx.x; i < width; i += kThreads) own[i] = (row[width - 1 - i] - mean) * scale;
}

}  // namespace

int turn_rows(float* x, float* largest, unsigned long long* found, int64_t rows, int64_t width, void* stream) {
  HEADRACE_LAUNCH_SHARED(turn, static_cast<unsigned>(rows), kThreads, width * sizeof(float), stream, x, largest, found,
                         static_cast<unsigned>(width));
  return HEADRACE_LAUNCH_STATUS();
}

}  // namespace headrace
