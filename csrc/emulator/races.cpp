#include "races.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace headrace::emulator {
namespace {

constexpr uintptr_t kCell = 2;  // bytes: a bf16, the smallest that two threads may own side by side
constexpr unsigned kNobody = ~0u;

// When a thread did something: two moments of different threads are in order if a barrier of their block was between
// them, or one of their warp.
struct Moment {
  unsigned thread = kNobody;
  unsigned block_barriers;
  unsigned warp_barriers;
};

struct Cell {
  Moment write, read, other_read;  // the last ones; the reads are of two threads
};

unsigned block_barriers;
std::vector<unsigned> warp_barriers;
std::unordered_map<uintptr_t, Cell> cells;

bool in_order(const Moment& before, const Moment& now) {
  if (before.thread == kNobody || before.thread == now.thread || before.block_barriers != now.block_barriers) return true;
  return before.thread / 32 == now.thread / 32 && before.warp_barriers != now.warp_barriers;
}

[[noreturn]] void report(const Moment& before, const Moment& now, bool was_write, bool is_write, void* code) {
  Dl_info library{};
  dladdr(code, &library);
  char text[240];
  std::snprintf(text, sizeof(text), "race: thread %u %s what thread %u %s, with no barrier in between (addr2line -e %.80s %#zx)",
                now.thread, is_write ? "writes" : "reads", before.thread, was_write ? "wrote" : "read",
                library.dli_fname ? library.dli_fname : "?",
                static_cast<std::size_t>(static_cast<char*>(code) - static_cast<char*>(library.dli_fbase)));
  fail(text);
}

void access(void* address, std::size_t bytes, bool is_write, void* code) {
  if (!on_a_thread()) return;  // a launcher's own memory
  const unsigned thread = thread_number();
  const Moment now{thread, block_barriers, warp_barriers[thread / 32]};
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin / kCell; at <= (begin + bytes - 1) / kCell; ++at) {
    Cell& cell = cells[at];
    if (!in_order(cell.write, now)) report(cell.write, now, true, is_write, code);
    if (is_write) {
      if (!in_order(cell.read, now)) report(cell.read, now, false, true, code);
      if (!in_order(cell.other_read, now)) report(cell.other_read, now, false, true, code);
      cell.write = now;
    } else {
      if (cell.read.thread != thread) cell.other_read = cell.read;
      cell.read = now;
    }
  }
}

}  // namespace

void race_block_begins(unsigned threads) {
  block_barriers = 0;
  warp_barriers.assign((threads + 31) / 32, 0);
  cells.clear();
}

void race_block_met() { ++block_barriers; }
void race_warp_met(unsigned warp) { ++warp_barriers[warp]; }

}  // namespace headrace::emulator

// What g++ calls, by the names of ThreadSanitizer.
#define HEADRACE_HOOKS(bytes)                                                                  \
  void __tsan_read##bytes(void* p) {                                                           \
    headrace::emulator::access(p, bytes, false, __builtin_return_address(0));                  \
  }                                                                                            \
  void __tsan_write##bytes(void* p) {                                                          \
    headrace::emulator::access(p, bytes, true, __builtin_return_address(0));                   \
  }                                                                                            \
  void __tsan_unaligned_read##bytes(void* p) {                                                 \
    headrace::emulator::access(p, bytes, false, __builtin_return_address(0));                  \
  }                                                                                            \
  void __tsan_unaligned_write##bytes(void* p) {                                                \
    headrace::emulator::access(p, bytes, true, __builtin_return_address(0));                   \
  }
extern "C" {
HEADRACE_HOOKS(1)
HEADRACE_HOOKS(2)
HEADRACE_HOOKS(4)
HEADRACE_HOOKS(8)
HEADRACE_HOOKS(16)
void __tsan_read_range(void* p, std::size_t bytes) {
  headrace::emulator::access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t bytes) {
  headrace::emulator::access(p, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
