// Threads that work through one decoding step together. A step is hundreds of small phases, far too short to wake
// threads for each: the thread that comes first leads and runs the step, the others stay awake and take what the leader
// hands out, until the step is over. Nothing waits for a helper that has taken nothing, so a leader that no one helps
// (crocuta_parallel may have found the pool in use) does all the work alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "threads.h"

namespace {

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  int64_t threads() const { return threads_; }

  // work(task) for every task in [0, tasks), by whoever is there; returns when all are done. Only for the leader.
  template <typename Work>
  void run(int64_t tasks, const Work& work) {
    if (threads_ == 1 || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) work(task);
      return;
    }
    call_.store([](const void* context, int64_t task) { (*static_cast<const Work*>(context))(task); },
                std::memory_order_release);
    context_.store(&work, std::memory_order_release);
    tasks_.store(tasks, std::memory_order_release);
    finished_.store(0, std::memory_order_relaxed);
    phase_ += kPhase;
    ticket_.store(phase_, std::memory_order_release);
    while (take()) {
    }
    for (int64_t spins = 0; finished_.load(std::memory_order_acquire) != tasks; ++spins) relax(spins);
    ticket_.store(phase_ | (kPhase - 1), std::memory_order_relaxed);  // no task has this number: nothing to take
  }

  // What every thread does: the first leads, which is to call step(*this).
  template <typename Step>
  void join(const Step& step) {
    if (!led_.exchange(true)) {
      step(*this);
      over_.store(true, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; !over_.load(std::memory_order_acquire); ++spins) {
      if (take())
        spins = 0;
      else
        relax(spins);
    }
  }

 private:
  static constexpr uint64_t kPhase = uint64_t(1) << 32;  // the lower half of a ticket is the number of the next task

  // Do one task of the current phase, if there is one left. The leader closes the old ticket before it writes what
  // belongs to the next phase: whoever has read anything of that fails to take a task of the old one.
  bool take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t task = static_cast<int64_t>(ticket & (kPhase - 1)), tasks = tasks_.load(std::memory_order_acquire);
      const auto call = call_.load(std::memory_order_acquire);
      const void* context = context_.load(std::memory_order_acquire);
      if (task >= tasks) return false;
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
        call(context, task);
        finished_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  static void relax(int64_t spins) {
    if (spins > 2000) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t threads_;
  std::atomic<bool> led_{false}, over_{false};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> tasks_{0}, finished_{0};
  std::atomic<uint64_t> ticket_{kPhase - 1};
  uint64_t phase_ = 0;
};

}  // namespace
