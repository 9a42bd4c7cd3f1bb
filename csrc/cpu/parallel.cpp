#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace xattn {
namespace {

struct Job {
  int64_t count;
  void (*task)(void*, int64_t, int);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};
  std::mutex error_mutex{};

  void run(int worker) {
    for (int64_t i; !failed.load(std::memory_order_relaxed) && (i = next.fetch_add(1)) < count;) {
      try {
        task(context, i, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads look out for the next job, or its end, for some 20 microseconds, the time between two phases of
// one call, and then sleep: a pool that goes on spinning takes the cores from PyTorch's own threads.
constexpr int kLooks = 1000;
template <class Condition>
void look_out(const Condition& condition) {
  for (int i = 0; i < kLooks && !condition(); ++i) relax();
}

class Pool {
 public:
  void run(Job& job, int threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < threads - 1) {
        int worker = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, worker] { loop(worker); });
      }
      job_ = &job;
      wanted_ = threads - 1;
      pending_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    job.run(0);
    look_out([this] { return pending_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    job_ = nullptr;
  }

  std::mutex& owner() { return owner_; }

 private:
  void loop(int worker) {
    uint64_t seen = 0;
    for (;;) {
      look_out([&] { return generation_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > wanted_) continue;
      Job* job = job_;
      lock.unlock();
      job->run(worker);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // one job at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int wanted_ = 0;
  // Written under the mutex; atomic so that look_out can read them without it.
  std::atomic<int> pending_{0};
  std::atomic<uint64_t> generation_{0};
};

// Never destroyed: its threads may outlive static destruction. A child of fork() has none of the
// threads, so it starts with a new pool.
Pool* pool = nullptr;

Pool& get_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void run_tasks(int64_t count, int threads, void (*task)(void*, int64_t, int), void* context) {
  if (count <= 0) return;
  Job job{count, task, context};
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
    Pool& shared = get_pool();
    // A second Python thread that calls meanwhile computes on its own thread: same result, no wait.
    std::unique_lock<std::mutex> owner(shared.owner(), std::try_to_lock);
    if (owner.owns_lock()) {
      shared.run(job, threads);
    } else {
      job.run(0);
    }
  } else {
    job.run(0);
  }
  if (job.error) std::rethrow_exception(job.error);
}

Scratch::Scratch(size_t bytes) {
  constexpr size_t kLine = 64;
  // One spare vector, so that whole vectors may be read at the end.
  void* memory = nullptr;
  if (posix_memalign(&memory, kLine, bytes + kLine) != 0) throw std::bad_alloc();
  data_ = static_cast<char*>(memory);
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace xattn
