#include "block.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" char headrace_shared_begin[], headrace_shared_end[];  // shared.ld

namespace headrace::emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kMostShared = 227 * 1024;  // of a block on sm_90; sm_80 has 163 KB

enum class State { ready, at_block_barrier, at_warp_barrier, returned };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Place place;  // where it waits
  unsigned mask;
  uint64_t brought;
  unsigned from;
  Met met;
};

Schedule schedule = Schedule::forward;
unsigned schedule_seed = 0;
int status = cudaSuccess;

// All that follows is of the launch that is running. There is one at a time.
std::mutex one_launch;
const char* kernel_name;
const std::function<void()>* kernel_call;
std::vector<std::unique_ptr<Thread>> threads;  // kept for the next launch, with their stacks
unsigned count;                                // threads in a block
unsigned running;
unsigned returned, at_block_barrier;  // how many
unsigned first_at_block_barrier;      // which
Fiber scheduler;
std::vector<char> dynamic_memory;
std::string problem;  // "" while all is well; the scheduler then stops
std::mt19937 generator;

std::string text(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(place.what) + " (" + (slash ? slash + 1 : place.file) + ":" + std::to_string(place.line) + ")";
}

std::string block_name() {
  char name[160];
  std::snprintf(name, sizeof(name), "emulated kernel %.80s, block (%u, %u, %u): ", kernel_name, blockIdx.x, blockIdx.y,
                blockIdx.z);
  return name;
}

std::string thread_name(unsigned thread) {
  const uint3 at = threads[thread]->index;
  std::string name = "thread " + std::to_string(at.x);
  if (blockDim.y > 1 || blockDim.z > 1) name += ", " + std::to_string(at.y) + ", " + std::to_string(at.z);
  return name;
}

void give_way() { threads[running]->fiber.resume(scheduler); }

[[noreturn]] void fail_with(const std::string& what) {
  problem = block_name() + what;
  for (;;) give_way();  // nobody comes back
}

// Frees the threads at the block's barrier once all that have not returned are there.
void release_block() {
  if (at_block_barrier == 0 || at_block_barrier + returned < count) return;
  for (unsigned i = 0; i < count; ++i)
    if (threads[i]->state == State::at_block_barrier) threads[i]->state = State::ready;
  at_block_barrier = 0;
}

// Frees the lanes that wait for exactly the lanes in `mask` once all of those that have not returned are there.
void release_warp(unsigned warp, unsigned mask) {
  unsigned there = 0, ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned i = warp * kWarp + lane;
    if ((mask >> lane & 1) == 0 || i >= count || threads[i]->state == State::returned) continue;
    if (threads[i]->state != State::at_warp_barrier || threads[i]->mask != mask) return;
    there |= 1u << lane;
    if (threads[i]->brought != 0) ballot |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((there >> lane & 1) == 0) continue;
    Thread& thread = *threads[warp * kWarp + lane];
    if ((there >> thread.from & 1) == 0) {
      problem = block_name() + text(thread.place) + " of " + thread_name(warp * kWarp + lane) + " reads lane " +
                std::to_string(thread.from) + ", which is not among the lanes that meet";
      return;
    }
    thread.met = {threads[warp * kWarp + thread.from]->brought, ballot};
  }
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (there >> lane & 1) threads[warp * kWarp + lane]->state = State::ready;
}

void check_same_place(const Thread& other, unsigned number, Place place) {
  if (other.place.line != place.line || std::strcmp(other.place.file, place.file) != 0 ||
      std::strcmp(other.place.what, place.what) != 0)
    fail_with("divergent barrier: " + thread_name(number) + " waits at " + text(other.place) + ", but " +
              thread_name(running) + " came to " + text(place));
}

// Where a fiber begins: one thread from its first line to its last.
void run_thread() {
  threads[running]->fiber.arrived();
  (*kernel_call)();
  const unsigned me = running, warp = me / kWarp;
  threads[me]->state = State::returned;
  ++returned;
  release_block();
  for (unsigned i = warp * kWarp; i < std::min(count, (warp + 1) * kWarp); ++i)  // those who waited for this one
    if (threads[i]->state == State::at_warp_barrier) release_warp(warp, threads[i]->mask);
  for (;;) give_way();
}

void step(unsigned thread) {
  running = thread;
  threadIdx = threads[thread]->index;
  scheduler.resume(threads[thread]->fiber);
  if (!problem.empty()) throw std::runtime_error(problem);
}

// "40 threads wait at __syncthreads (norm.cu:12), thread 0 first; 24 have returned"
std::string who_waits() {
  std::string list;
  std::vector<bool> told(count, false);
  for (unsigned i = 0; i < count; ++i) {
    if (told[i] || threads[i]->state == State::returned) continue;
    unsigned waiting = 0;
    const std::string place = text(threads[i]->place);
    for (unsigned j = i; j < count; ++j)
      if (threads[j]->state == threads[i]->state && threads[j]->mask == threads[i]->mask &&
          text(threads[j]->place) == place) {
        told[j] = true;
        ++waiting;
      }
    list += (list.empty() ? "" : "; ") + std::to_string(waiting) + " threads wait at " + place + ", " +
            thread_name(i) + " first";
  }
  return list + "; " + std::to_string(returned) + " have returned";
}

bool ready(unsigned thread) { return threads[thread]->state == State::ready; }

// One pass in which threads go in turn. True if somebody went.
bool go_round(bool backwards) {
  bool went = false;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned thread = backwards ? count - 1 - i : i;
    if (!ready(thread)) continue;
    step(thread);
    went = true;
  }
  return went;
}

bool go_random() {
  std::vector<unsigned> who;
  for (unsigned i = 0; i < count; ++i)
    if (ready(i)) who.push_back(i);
  std::shuffle(who.begin(), who.end(), generator);
  // Half of them, so that some are two barriers ahead of others where the barriers allow it.
  who.resize((who.size() + 1) / 2);
  for (const unsigned thread : who) step(thread);
  return !who.empty();
}

bool go_greedy(bool backwards) {
  const unsigned warps = (count + kWarp - 1) / kWarp;
  bool went = false;
  for (unsigned w = 0; w < warps; ++w) {
    const unsigned first = (backwards ? warps - 1 - w : w) * kWarp, end = std::min(count, first + kWarp);
    for (bool more = true; more;) {
      more = false;
      for (unsigned i = first; i < end; ++i) {
        const unsigned thread = backwards ? first + end - 1 - i : i;
        if (!ready(thread)) continue;
        step(thread);
        more = went = true;
      }
    }
  }
  return went;
}

bool go() {
  switch (schedule) {
    case Schedule::forward:
      return go_round(false);
    case Schedule::reverse:
      return go_round(true);
    case Schedule::random:
      return go_random();
    case Schedule::warp_greedy:
      return go_greedy(false);
    case Schedule::greedy_reverse:
      return go_greedy(true);
  }
  return false;
}

// Not memset: AddressSanitizer guards the gaps between variables.
__attribute__((no_sanitize_address)) void poison(volatile char* begin, const volatile char* end) {
  for (; begin != end; ++begin) *begin = static_cast<char>(0xff);
}

void run_block(uint3 index) {
  blockIdx = index;
  poison(headrace_shared_begin, headrace_shared_end);
  std::memset(dynamic_memory.data(), 0xff, dynamic_memory.size());
  returned = at_block_barrier = 0;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.state = State::ready;
    thread.mask = 0;
    thread.fiber.restart(run_thread);
  }
  while (returned < count)
    if (!go()) throw std::runtime_error(block_name() + "deadlock: " + who_waits());
}

bool possible(dim3 blocks, dim3 block, std::size_t shared_bytes) {
  const bool some = blocks.x > 0 && blocks.y > 0 && blocks.z > 0 && block.x > 0 && block.y > 0 && block.z > 0;
  return some && blocks.x <= 0x7fffffffu && blocks.y <= 65535 && blocks.z <= 65535 && block.z <= 64 &&
         uint64_t{block.x} * block.y * block.z <= 1024 && shared_bytes <= kMostShared;
}

}  // namespace

void set_schedule(Schedule new_schedule, unsigned seed) {
  const std::lock_guard<std::mutex> lock(one_launch);
  schedule = new_schedule;
  schedule_seed = seed;
}

int launch_status() {
  const int last = status;
  status = cudaSuccess;
  return last;
}

void launch(const char* name, dim3 blocks, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (status != cudaSuccess) return;
  problem.clear();
  if (!possible(blocks, block, shared_bytes)) {
    status = cudaErrorInvalidConfiguration;
    return;
  }
  kernel_name = name;
  kernel_call = &kernel;
  gridDim = blocks;
  blockDim = block;
  count = block.x * block.y * block.z;
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  dynamic_memory.assign(shared_bytes, 0);
  generator.seed(schedule_seed);
  std::vector<uint64_t> order(uint64_t{blocks.x} * blocks.y * blocks.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), generator);
  if (schedule == Schedule::reverse || schedule == Schedule::greedy_reverse) std::reverse(order.begin(), order.end());
  try {
    for (const uint64_t i : order)
      run_block({static_cast<unsigned>(i % blocks.x), static_cast<unsigned>(i / blocks.x % blocks.y),
                 static_cast<unsigned>(i / blocks.x / blocks.y)});
  } catch (const std::runtime_error& error) {
    problem = error.what();
    status = cudaErrorLaunchFailure;
  }
}

const char* failure() { return problem.c_str(); }

void* dynamic_shared() { return dynamic_memory.data(); }

unsigned lane() { return running % kWarp; }

void meet_block(Place place) {
  Thread& me = *threads[running];
  if (at_block_barrier == 0) first_at_block_barrier = running;
  else check_same_place(*threads[first_at_block_barrier], first_at_block_barrier, place);
  me.place = place;
  me.state = State::at_block_barrier;
  ++at_block_barrier;
  release_block();
  if (me.state != State::ready) give_way();
}

Met meet_warp(Place place, unsigned mask, uint64_t value, unsigned from) {
  const unsigned me = running, warp = me / kWarp;
  if ((mask >> lane() & 1) == 0) fail(place, "the calling lane is not in its own mask");
  for (unsigned i = warp * kWarp; i < std::min(count, (warp + 1) * kWarp); ++i)
    if (threads[i]->state == State::at_warp_barrier && threads[i]->mask == mask) check_same_place(*threads[i], i, place);
  Thread& thread = *threads[me];
  thread.place = place;
  thread.mask = mask;
  thread.brought = value;
  thread.from = from;
  thread.state = State::at_warp_barrier;
  release_warp(warp, mask);
  if (thread.state != State::ready) give_way();
  return thread.met;
}

void fail(Place place, const char* what) {
  fail_with(text(place) + " of " + thread_name(running) + ": " + what);
}

}  // namespace headrace::emulator

// For Python through ctypes, and for binding.h.
extern "C" __attribute__((visibility("default"))) const char* headrace_failure() {
  return headrace::emulator::failure();
}
extern "C" __attribute__((visibility("default"))) void headrace_set_schedule(int schedule, unsigned seed) {
  headrace::emulator::set_schedule(static_cast<headrace::emulator::Schedule>(schedule), seed);
}
