#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

extern "C" {
// Null without AddressSanitizer.
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.hidden xattn_twin_switch
.globl xattn_twin_switch
.type xattn_twin_switch, @function
xattn_twin_switch:
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
.size xattn_twin_switch, .-xattn_twin_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.hidden xattn_twin_switch
.globl xattn_twin_switch
.type xattn_twin_switch, %function
xattn_twin_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size xattn_twin_switch, .-xattn_twin_switch
)");
#endif

namespace xattn::cuda::twin {
namespace {

#if !defined(XATTN_TWIN_UCONTEXT)
extern "C" void xattn_twin_switch(void** from, void* to);
#endif

// Address space, of which only what is used becomes memory.
constexpr size_t kStack = 256 << 10;

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  char* top = const_cast<char*>(fiber.stack) + fiber.stack_size;
#if defined(__x86_64__)
  // Six registers, the address to return to, and none above it: the stack is as after a call.
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = frame;
#elif defined(__aarch64__)
  char* frame = top - 160;
  std::memset(frame, 0, 160);
  std::memcpy(frame + 88, &entry, sizeof(entry));
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = top - fiber.stack_size;
  fiber.context.uc_stack.ss_size = fiber.stack_size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
  fiber.fake_stack = nullptr;
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
  }
#if defined(XATTN_TWIN_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  xattn_twin_switch(&from.stack_pointer, to.stack_pointer);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void entered(Fiber& previous) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!previous.stack) {
    previous.stack = static_cast<const char*>(bottom);
    previous.stack_size = size;
  }
}

void abandon(Fiber& fiber) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, fiber.stack_size);
}

void make_stacks(Fiber* const* fibers, int count) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t step = kStack + page;
  void* memory = mmap(nullptr, static_cast<size_t>(count) * step, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("twin: no memory for the stacks of threads");
  for (int i = 0; i < count; i++) {
    char* lowest = static_cast<char*>(memory) + static_cast<size_t>(i) * step;
    if (mprotect(lowest, page, PROT_NONE) != 0) throw std::runtime_error("twin: no guard page below a stack");
    fibers[i]->stack = lowest + page;
    fibers[i]->stack_size = kStack;
  }
}

}  // namespace xattn::cuda::twin
