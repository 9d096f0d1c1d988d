#include "rows.h"

#include "device.cuh"

namespace headrace {
namespace {

constexpr unsigned kThreads = 96;

// A block takes a row and keeps it in dynamic shared memory; it is written back in reverse order of warps, so that
// threads read what other threads wrote.
__global__ void __launch_bounds__(kThreads) center(float* x, float* sums, unsigned long long* found, unsigned width) {
  HEADRACE_DYNAMIC_SHARED(float, row);
  __shared__ unsigned above[kThreads / kWarp];
  float* from = x + static_cast<int64_t>(blockIdx.x) * width;
  float sum = 0.0f, most = 0.0f;
  unsigned large = 0;
  for (unsigned start = 0; start < width; start += kThreads) {
    const unsigned i = start + threadIdx.x;
    const float value = i < width ? from[i] : 0.0f;
    if (i < width) row[i] = value;
    sum += value;
    most = larger(most, fabsf(value));
    large += __popc(__ballot_sync(kAllLanes, value > 1.0f));
  }
  if (threadIdx.x % kWarp == 0) above[threadIdx.x / kWarp] = large;
  sum = block_sum(sum);
  most = block_max(most);
  if (threadIdx.x == 0) {
    unsigned long long all = 0, some = 0;
    for (const unsigned each : above) {
      all += each;
      some += each != 0;
    }
    atomicAdd(&found[0], all);
    atomicAdd(&found[1], some);
    sums[blockIdx.x] = sum;
  }
  const float mean = sum / static_cast<float>(width);
  for (unsigned i = threadIdx.x; i < width; i += kThreads) from[width - 1 - i] = (row[width - 1 - i] - mean) / most;
}

}  // namespace

int center_rows(float* x, float* sums, unsigned long long* found, int64_t rows, int64_t width, void* stream) {
  HEADRACE_LAUNCH_SHARED(center, static_cast<unsigned>(rows), kThreads, width * sizeof(float), stream, x, sums, found,
                         static_cast<unsigned>(width));
  return HEADRACE_LAUNCH_STATUS();
}

}  // namespace headrace
