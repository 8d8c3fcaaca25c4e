#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define CROCUTA_FORKS 1
#endif

namespace {

struct Job {
  void (*work)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(context, task);
  }
};

class Pool {
 public:
  // False if another thread is using the pool.
  bool run(Job& job, int64_t threads) {
    std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
    if (!use.owns_lock()) return false;
    const size_t helpers = static_cast<size_t>(threads - 1);
    while (workers_.size() < helpers) workers_.emplace_back([this, index = workers_.size()] { serve(index); });
    {
      std::lock_guard<std::mutex> guard(mutex_);
      job_ = &job;
      wanted_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void serve(size_t index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_ || job_ == nullptr) continue;
      Job* job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  size_t wanted_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads sleep until the process ends, and a forked child, which has none of them, starts anew.
std::atomic<Pool*> pool{nullptr};

void forget_pool() { pool.store(nullptr); }

Pool& the_pool() {
  Pool* current = pool.load();
  if (current == nullptr) {
#ifdef CROCUTA_FORKS
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

extern "C" void crocuta_parallel(int64_t threads, int64_t tasks, void (*work)(void*, int64_t), void* context) {
  Job job;
  job.work = work;
  job.context = context;
  job.tasks = tasks;
  const int64_t useful = threads < tasks ? threads : tasks;
  if (useful > 1 && the_pool().run(job, useful)) return;
  job.run();
}
