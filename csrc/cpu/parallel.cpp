#include "parallel.h"

#include <dlfcn.h>
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

// Threads of our own, for where there is no OpenMP. They wait on a condition variable: a pool that spins
// would take the cores from others.
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
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    job_ = nullptr;
  }

  std::mutex& owner() { return owner_; }

 private:
  void loop(int worker) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
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
  int wanted_ = 0, pending_ = 0;
  uint64_t generation_ = 0;
};

// OpenMP's entry point for a team of threads, in GCC's naming, which Clang's and Intel's runtimes share.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// What runs jobs in this process. PyTorch's own threads wait for their next work by spinning, for
// milliseconds, so a second pool beside them would get half of the cores. If PyTorch has loaded an OpenMP
// runtime, its team is the one to use. OpenMP does not survive fork(): a child has a pool of ours.
struct Threads {
  Team team;
  Pool pool;
};
Threads* threads_of_process = nullptr;  // never destroyed: threads may outlive static destruction

// From the moment this module is loaded: PyTorch may have used its team before we do.
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { threads_of_process = new Threads{nullptr, {}}; });

Threads& get_threads() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (threads_of_process == nullptr)
      threads_of_process = new Threads{reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")), {}};
  });
  return *threads_of_process;
}

struct TeamJob {
  Job& job;
  std::atomic<int> workers{0};
};

}  // namespace

void run_tasks(int64_t count, int threads, void (*task)(void*, int64_t, int), void* context) {
  if (count <= 0) return;
  Job job{count, task, context};
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
    Threads& shared = get_threads();
    if (shared.team) {
      TeamJob team_job{job};
      shared.team(
          [](void* data) {
            TeamJob& mine = *static_cast<TeamJob*>(data);
            mine.job.run(mine.workers.fetch_add(1));
          },
          &team_job, static_cast<unsigned>(threads), 0);
    } else {
      // A second Python thread that calls meanwhile computes on its own thread: same result, no wait.
      std::unique_lock<std::mutex> owner(shared.pool.owner(), std::try_to_lock);
      if (owner.owns_lock()) {
        shared.pool.run(job, threads);
      } else {
        job.run(0);
      }
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
