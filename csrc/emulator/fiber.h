// Fibers: functions with a stack of their own that hand the processor to each other. One becomes one CUDA thread.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace headrace::emulator {

class Fiber {
 public:
  // The running thread of the operating system becomes a fiber by this; it has its stack already.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // When it is next resumed, it calls `entry` on an empty stack. What it was doing is forgotten, without destructors.
  // `entry` never returns: it hands the processor on.
  void restart(void (*entry)());

  // Suspends this fiber, which must be the running one, and resumes the other. Returns when somebody resumes this one.
  void resume(Fiber& other);

  // What `entry` must call first: tells AddressSanitizer which stack is in use.
  void arrived();

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;  // of kStackBytes, above a page that may not be touched; nullptr: the system's
  const void* sanitizer_bottom_ = nullptr;
  std::size_t sanitizer_size_ = 0;
  void* sanitizer_fake_stack_ = nullptr;
};

}  // namespace headrace::emulator
