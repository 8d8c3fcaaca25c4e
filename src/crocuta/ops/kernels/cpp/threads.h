// Threads of our own: a pool that sleeps between calls, obeys the count it is given and survives a fork.
#pragma once

#include <cstdint>

// Runs work(context, task) for every task in [0, tasks), on at most `threads` threads, this one included. Which thread
// takes which task differs from run to run, so results may not depend on it. Calls from several threads at once are
// safe: one gets the pool, the others do their work alone.
extern "C" void crocuta_parallel(int64_t threads, int64_t tasks, void (*work)(void*, int64_t), void* context);

template <typename Work>
inline void parallel(int64_t threads, int64_t tasks, Work&& work) {
  if (threads == 1) {  // what is shared out costs an atomic number a task
    for (int64_t task = 0; task < tasks; ++task) work(task);
    return;
  }
  crocuta_parallel(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<Work*>(context))(task); }, &work);
}
