// On x86-64 a switch is fourteen instructions: it saves the registers that a function must preserve, and no signal mask,
// which costs ucontext two system calls. A block of 1,024 threads with ten barriers needs 10,000 switches.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace headrace::emulator {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;  // kernels keep little on it; AddressSanitizer spreads that out

#if defined(__SANITIZE_ADDRESS__)
Fiber* leaving = nullptr;  // whose stack was in use before the last switch
#endif

char* new_stack() {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);  // a stack that overflows is a fault at once
  return static_cast<char*>(memory) + page;
}

}  // namespace

#if defined(__x86_64__)
// headrace_switch(void** save, void* load): rdi, rsi. System V ABI: rbx, rbp, r12-r15 belong to the caller.
extern "C" void headrace_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
  .text
  .hidden headrace_switch
  .globl headrace_switch
  .type headrace_switch, @function
headrace_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size headrace_switch, . - headrace_switch
)");
#endif

Fiber::~Fiber() {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (stack_ != nullptr) munmap(stack_ - page, page + kStackBytes);
}

void Fiber::restart(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // left by functions that were forgotten
#endif
  sanitizer_bottom_ = stack_;
  sanitizer_size_ = kStackBytes;
  sanitizer_fake_stack_ = nullptr;
#if defined(__x86_64__)
  // As if `entry` had been called from nowhere and then switched away: its address where `ret` looks for it, six
  // registers below, and above it an empty slot, so that the stack is aligned as after a call.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack_ + kStackBytes) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  stack_pointer_ = top - 6;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::resume(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
  leaving = this;
  __sanitizer_start_switch_fiber(&sanitizer_fake_stack_, other.sanitizer_bottom_, other.sanitizer_size_);
#endif
#if defined(__x86_64__)
  headrace_switch(&stack_pointer_, other.stack_pointer_);
#else
  swapcontext(&context_, &other.context_);
#endif
  arrived();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_fake_stack_, &leaving->sanitizer_bottom_, &leaving->sanitizer_size_);
#endif
}

}  // namespace headrace::emulator
