// Loops over the caller's threads.
#pragma once

#include "kernels.h"

namespace memkernel::MEMKERNEL_ISA {

// body(i) for i in [0, tasks).
template <class Body>
void parallel(const Threads& threads, int64_t tasks, const Body& body) {
  const auto task = [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
  threads.parallel(tasks, task, const_cast<Body*>(&body));
}

// body(i) for i in [0, n), each thread a run of neighbours.
template <class Body>
void parallel_runs(const Threads& threads, int64_t n, const Body& body) {
  const int64_t runs = threads.count < n ? threads.count : n;
  parallel(threads, runs, [&](int64_t run) {
    for (int64_t i = n * run / runs; i < n * (run + 1) / runs; ++i) body(i);
  });
}

}  // namespace memkernel::MEMKERNEL_ISA
