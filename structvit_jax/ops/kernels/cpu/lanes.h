// Shared by the native kernels: SIMD registers, arrays aligned to cache lines, and a loop over all threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define INLINE inline __attribute__((always_inline))

namespace structvit {

namespace ffi = xla::ffi;

#ifdef __AVX512F__
constexpr long LANES = 16;  // floats in a register
#else
constexpr long LANES = 8;
#endif
constexpr long PAIR = 2 * LANES;  // inner loops work on two registers side by side
constexpr long TASKS = 16;        // the least number of tasks to split work into, if it can be split so far

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Bits __attribute__((vector_size(4 * LANES)));

INLINE Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
INLINE void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
INLINE Lanes all(float x) { return x - Lanes{}; }  // x in every lane

inline long ceil_div(long n, long unit) { return (n + unit - 1) / unit; }
inline long round_up(long n, long unit) { return ceil_div(n, unit) * unit; }

// An uninitialised array of floats, aligned to a cache line.
class Floats {
  std::unique_ptr<float, decltype(&std::free)> first;

 public:
  explicit Floats(long count) : first(static_cast<float*>(std::aligned_alloc(64, 4 * round_up(count, 16))), std::free) {
    if (!first) throw std::bad_alloc();
  }
  float* data() { return first.get(); }
  float& operator[](long i) { return first.get()[i]; }
};

inline Floats zeros(long count) {
  Floats array(count);
  std::fill_n(array.data(), count, 0.f);
  return array;
}

// Runs work(0) ... work(tasks - 1) on the calling thread and the threads of the pool. Each thread calls make() for its
// own `work`, which includes scratch memory. The caller runs tasks until none is left, then waits only for those that
// another thread has started. It never waits for a thread to become free, because all threads of the pool may be
// callers that wait here.
template <class Make>
void in_parallel(ffi::ThreadPool& pool, long tasks, Make make) {
  struct Shared {
    std::atomic<long> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto drain = [shared, tasks, &make] {
    long task = shared->next++;
    if (task >= tasks) return;  // this may run long after all tasks are done
    auto work = make();
    long last;
    do {
      work(task);
      task = shared->next++;
      last = ++shared->done;
    } while (task < tasks);
    if (last < tasks) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->finished.notify_one();
  };
  for (long helper = 1; helper < std::min<long>(pool.num_threads(), tasks); ++helper) pool.Schedule(decltype(drain)(drain));
  drain();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == tasks; });
}

}  // namespace structvit
