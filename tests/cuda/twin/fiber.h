// Fibers: stacks of their own that one thread of the host switches between, in some nanoseconds.
//
// A switch saves the registers that a call preserves; elsewhere than on x86-64 and arm64 it is ucontext's.
// AddressSanitizer is told of every switch when it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define XATTN_TWIN_UCONTEXT
#include <ucontext.h>
#endif

namespace xattn::cuda::twin {

struct Fiber {
  void* stack_pointer = nullptr;
  const char* stack = nullptr;  // lowest address
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(XATTN_TWIN_UCONTEXT)
  ucontext_t context;
#endif
};

// Makes `fiber` call `entry`, which never returns, when it is first switched to.
void prepare(Fiber& fiber, void (*entry)());
// Goes on in `to`; returns when somebody switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to);
// To be called first in a fiber's entry. Learns the stack of `previous` where it is not known.
void entered(Fiber& previous);
// Forgets what AddressSanitizer knows of the frames of a fiber that will never end.
void abandon(Fiber& fiber);
// `count` stacks, each above a page that must not be touched.
void make_stacks(Fiber* const* fibers, int count);

}  // namespace xattn::cuda::twin
