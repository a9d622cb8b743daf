// What the native operations share: registers, memory at whole cache lines, and a loop on all threads.

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
constexpr long LANES = 16;
#else
constexpr long LANES = 8;
#endif
constexpr long PAIR = 2 * LANES;  // inner loops work on two registers side by side
constexpr long TASKS = 16;        // that work is cut into, at least, where it can be

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Bits __attribute__((vector_size(4 * LANES)));

INLINE Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
INLINE void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
INLINE Lanes all(float x) { return x - Lanes{}; }

inline long ceil_div(long n, long unit) { return (n + unit - 1) / unit; }
inline long round_up(long n, long unit) { return ceil_div(n, unit) * unit; }

// Room for floats, from the start of a cache line.
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
  Floats made(count);
  std::fill_n(made.data(), count, 0.f);
  return made;
}

// Runs work(0) ... work(tasks - 1) on the pool's threads and this one, each of which makes its own `work`, with what
// room it needs. It waits for tasks that somebody has begun, never for a thread to come: all of the pool's may be
// waiting here themselves.
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
    if (task >= tasks) return;  // perhaps long after all is done
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
