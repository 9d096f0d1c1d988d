// Runs a kernel's blocks one after another, the threads of a block as fibers that change at barriers and shuffles.
//
// A correct kernel gives the same bits whichever thread goes first, so tests run it under several schedules. Every
// barrier checks that those who meet there belong together; when no thread can go on, the launch fails and says which
// threads wait where. Shared memory holds 0xff bytes (NaN, -1) when a block begins.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace headrace::emulator {

enum class Schedule {
  forward,        // every thread in turn, up to its next barrier
  reverse,        // the same, last thread and last block first
  random,         // any thread that can go on, any order of blocks; see set_schedule's seed
  warp_greedy,    // a warp runs as far as it can before the next one begins
  greedy_reverse  // the same, last warp first
};

void set_schedule(Schedule schedule, unsigned seed);

// Runs `kernel` for every thread. launch_status() then gives a cudaError_t, once: cudaErrorInvalidConfiguration for what
// CUDA would refuse to launch; cudaErrorLaunchFailure for what a GPU would hang on or leave undefined, and failure() says
// which barrier of which block it was. Nothing is launched between a failure and the question for it.
void launch(const char* name, dim3 blocks, dim3 threads, std::size_t shared_bytes, const std::function<void()>& kernel);
int launch_status();
const char* failure();

// A place in the source where threads wait for each other.
struct Place {
  const char* what;
  const char* file;
  int line;
};

// What follows is called by the thread that is running.

void* dynamic_shared();

// Waits for all threads of the block that have not returned.
void meet_block(Place place);

struct Met {
  uint64_t value;   // what lane `from` brought
  unsigned ballot;  // lanes that brought something other than 0
};

// Waits for the lanes of the warp in `mask`, and exchanges what they bring; `from` is a lane of this warp.
Met meet_warp(Place place, unsigned mask, uint64_t value, unsigned from);

unsigned lane();

// Ends the launch with an error.
[[noreturn]] void fail(Place place, const char* what);

}  // namespace headrace::emulator
