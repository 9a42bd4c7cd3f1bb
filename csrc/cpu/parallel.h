// Tasks over a pool of threads, and scratch memory. The only code that kernels share between
// instruction sets, so it is compiled once, for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xattn {

// Runs task(context, index, worker) for every index in [0, count) on at most `threads` threads, the
// caller among them; worker is in [0, threads). Which thread runs a task is not determined, so a task
// must write only what its index owns. Exceptions of tasks reach the caller.
void run_tasks(int64_t count, int threads, void (*task)(void*, int64_t, int), void* context);

template <class F>
void parallel_for(int64_t count, int threads, F&& body) {
  run_tasks(
      count, threads, [](void* context, int64_t index, int worker) { (*static_cast<F*>(context))(index, worker); },
      &body);
}

// Cache-line aligned scratch that lives as long as the object. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

}  // namespace xattn
