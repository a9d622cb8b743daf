// Softmax attention on CPUs, float32, forward and backward: what attention_cpu.py builds and calls.
//
// Products of queries and keys never leave the caches: a block of keys is brought into the order that the inner
// loop wants, all queries pass it, and running maxima and sums stand in for the whole row. Tasks share no
// results, and how the work is cut depends on shapes alone: the numbers do not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// One register, and the tile of a product that the registers hold: ROWS x COLS.
#ifdef __AVX512F__
constexpr long LANES = 16, ROWS = 12;
#else
constexpr long LANES = 8, ROWS = 6;
#endif
constexpr long COLS = 2 * LANES;
#ifdef __AVX512F__
constexpr long KEYS = 288;  // of a block, at most; a multiple of ROWS and COLS
#else
constexpr long KEYS = 240;
#endif
constexpr long QUERIES = 60;  // of a block, at most; a multiple of ROWS
constexpr long TASKS = 16;    // at least, where there are as many blocks
constexpr float LOWEST = -INFINITY;

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Bits __attribute__((vector_size(4 * LANES)));

Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
Lanes all(float x) { return x - Lanes{}; }

long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// The length of a block: blocks of at most `most`, all but the last alike, and a multiple of `unit`.
long block_of(long length, long most, long unit) {
  long blocks = std::max(1L, (length + most - 1) / most);
  return round_up((length + blocks - 1) / blocks, unit);
}

// exp by the polynomial of Cephes; zero below -87.
Lanes exp(Lanes x) {
  Lanes shifter = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Lanes low = all(-87.f);
  Lanes y = x < low ? low : x;
  Lanes sum = y * 1.44269504f + shifter, n = sum - shifter;
  Lanes r = y - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  Bits exponent = (Bits)sum - (Bits)shifter + 127;
  return x < low ? Lanes{} : p * (Lanes)(exponent << 23);
}

// c[r][j] (+)= sum over k of a[r * row + k * step] * b[k * ldb + j], for ROWS rows and `columns`, a multiple of COLS.
template <bool add>
void multiply(const float* a, long row, long step, const float* b, long ldb, float* c, long ldc, long depth,
              long columns) {
  for (long j = 0; j < columns; j += COLS) {
    Lanes left[ROWS], right[ROWS];
    for (long r = 0; r < ROWS; ++r) {
      left[r] = add ? load(c + r * ldc + j) : Lanes{};
      right[r] = add ? load(c + r * ldc + j + LANES) : Lanes{};
    }
    for (long k = 0; k < depth; ++k) {
      Lanes b0 = load(b + k * ldb + j), b1 = load(b + k * ldb + j + LANES);
#pragma GCC unroll 12
      for (long r = 0; r < ROWS; ++r) {
        Lanes x = all(a[r * row + k * step]);
        left[r] += x * b0;
        right[r] += x * b1;
      }
    }
    for (long r = 0; r < ROWS; ++r) {
      store(c + r * ldc + j, left[r]);
      store(c + r * ldc + j + LANES, right[r]);
    }
  }
}

// The rows of one head: row i, channels long, at i * stride.
struct Head {
  const float* data;
  long stride, channels;

  const float* row(long i) const { return data + i * stride; }

  // Rows from `first`, times scale, into to[rows][width]; zeros after the last channel, and after `count` rows.
  void copy(long first, long count, float* to, long rows, long width, float scale = 1.f) const {
    for (long i = 0; i < rows; ++i) {
      float* out = to + i * width;
      for (long c = 0; c < width; ++c) out[c] = i < count && c < channels ? scale * row(first + i)[c] : 0.f;
    }
  }

  // The same rows as columns: to[channels][KEYS].
  void transpose(long first, long count, float* to) const {
    for (long i = 0; i < round_up(count, COLS); ++i)
      for (long c = 0; c < channels; ++c) to[c * KEYS + i] = i < count ? row(first + i)[c] : 0.f;
  }
};

// One task: queries [first, last) of a head. out strided like the queries, lse one number a query.
void forward_task(Head query, Head key, Head value, long first, long last, long keys, float* out, float* lse) {
  long channels = query.channels, width = round_up(channels, COLS), rows = round_up(last - first, ROWS);
  std::vector<float> q(rows * width), sum(rows * width), top(rows, LOWEST), total(rows);
  std::vector<float> k(channels * KEYS), v(KEYS * width), products(ROWS * KEYS);
  query.copy(first, last - first, q.data(), rows, width, 1 / std::sqrt(float(channels)));
  long block = block_of(keys, KEYS, COLS);
  for (long at = 0; at < keys; at += block) {
    long count = std::min(block, keys - at), padded = round_up(count, COLS);
    key.transpose(at, count, k.data());
    value.copy(at, count, v.data(), count, width);
    for (long i = 0; i < rows; i += ROWS) {
      multiply<false>(&q[i * width], width, 1, k.data(), KEYS, products.data(), KEYS, channels, padded);
      for (long r = 0; r < ROWS; ++r) {
        float* p = &products[r * KEYS];
        for (long j = count; j < padded; ++j) p[j] = LOWEST;
        Lanes most = load(p);
        for (long j = LANES; j < padded; j += LANES) {
          Lanes x = load(p + j);
          most = most > x ? most : x;
        }
        float highest = top[i + r];
        for (long l = 0; l < LANES; ++l) highest = std::max(highest, most[l]);
        Lanes sums{};
        for (long j = 0; j < padded; j += LANES) {
          Lanes e = exp(load(p + j) - highest);
          store(p + j, e);
          sums += e;
        }
        float shrink = std::exp(top[i + r] - highest), added = 0;
        for (long l = 0; l < LANES; ++l) added += sums[l];
        top[i + r] = highest;
        total[i + r] = total[i + r] * shrink + added;
        if (shrink != 1.f)
          for (long c = 0; c < width; c += LANES)
            store(&sum[(i + r) * width + c], load(&sum[(i + r) * width + c]) * shrink);
      }
      multiply<true>(products.data(), KEYS, 1, v.data(), width, &sum[i * width], width, count, width);
    }
  }
  for (long i = 0; i < last - first; ++i) {
    for (long c = 0; c < channels; ++c) out[(first + i) * query.stride + c] = sum[i * width + c] / total[i];
    lse[first + i] = top[i] + std::log(total[i]);
  }
}

// One task: keys [first, last) of a head. Gradients of these, strided like them, and these keys' term of the
// gradient of all queries, of_query[rows][width], which comes zeroed.
void backward_task(Head query, Head key, Head value, Head output, Head cotangent, const float* lse, long queries,
                   long first, long last, float* of_query, float* of_key, float* of_value) {
  long channels = query.channels, width = round_up(channels, COLS);
  float scale = 1 / std::sqrt(float(channels));
  std::vector<float> k(KEYS * width), turned_k(channels * KEYS), turned_v(channels * KEYS);
  std::vector<float> d_k(KEYS * width), d_v(KEYS * width), q(QUERIES * width), g(QUERIES * width);
  std::vector<float> weights(QUERIES * KEYS), slopes(QUERIES * KEYS), delta(queries);
  for (long i = 0; i < queries; ++i)
    for (long c = 0; c < channels; ++c) delta[i] += output.row(i)[c] * cotangent.row(i)[c];
  long block = block_of(last - first, KEYS, COLS), group = block_of(queries, QUERIES, ROWS);
  for (long at = first; at < last; at += block) {
    long count = std::min(block, last - at), wide = round_up(count, COLS), tall = round_up(count, ROWS);
    key.copy(at, count, k.data(), KEYS, width);
    key.transpose(at, count, turned_k.data());
    value.transpose(at, count, turned_v.data());
    std::fill(d_k.begin(), d_k.end(), 0.f);
    std::fill(d_v.begin(), d_v.end(), 0.f);
    for (long i = 0; i < queries; i += group) {
      long some = std::min(group, queries - i), rows = round_up(some, ROWS);
      query.copy(i, some, q.data(), rows, width, scale);
      cotangent.copy(i, some, g.data(), rows, width);
      for (long r = 0; r < rows; r += ROWS) {
        multiply<false>(&q[r * width], width, 1, turned_k.data(), KEYS, &weights[r * KEYS], KEYS, channels, wide);
        multiply<false>(&g[r * width], width, 1, turned_v.data(), KEYS, &slopes[r * KEYS], KEYS, channels, wide);
      }
      for (long r = 0; r < rows; ++r) {
        float *w = &weights[r * KEYS], *s = &slopes[r * KEYS];
        float of_row = r < some ? lse[i + r] : -LOWEST, less = r < some ? delta[i + r] : 0.f;
        for (long j = 0; j < wide; j += LANES) {
          Lanes e = exp(load(w + j) - of_row);
          store(w + j, e);
          store(s + j, e * (load(s + j) - less));
        }
        for (long j = count; j < std::max(wide, tall); ++j) w[j] = s[j] = 0.f;
      }
      for (long r = 0; r < rows; r += ROWS)
        multiply<true>(&slopes[r * KEYS], KEYS, 1, k.data(), width, &of_query[(i + r) * width], width, count, width);
      for (long j = 0; j < tall; j += ROWS) {
        multiply<true>(&weights[j], 1, KEYS, g.data(), width, &d_v[j * width], width, some, width);
        multiply<true>(&slopes[j], 1, KEYS, q.data(), width, &d_k[j * width], width, some, width);
      }
    }
    for (long j = 0; j < count; ++j)
      for (long c = 0; c < channels; ++c) {
        of_key[(at + j) * key.stride + c] = d_k[j * width + c];
        of_value[(at + j) * key.stride + c] = d_v[j * width + c];
      }
  }
}

// Runs work(0) ... work(tasks - 1) on the pool's threads and this one. It waits for tasks that somebody has begun,
// never for a thread to come: all of the pool's may be waiting here themselves.
void in_parallel(ffi::ThreadPool& pool, long tasks, const std::function<void(long)>& work) {
  struct Shared {
    std::atomic<long> next{0};
    long done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto drain = [shared, tasks, &work] {
    for (long i; (i = shared->next++) < tasks;) {
      work(i);
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (++shared->done == tasks) shared->finished.notify_one();
    }
  };
  for (long helper = 1; helper < std::min<long>(pool.num_threads(), tasks); ++helper) pool.Schedule(std::function<void()>(drain));
  drain();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == tasks; });
}

// How many parts the heads of a batch are cut into, so that there are TASKS, or as many as there are blocks.
long parts_of(long heads, long length, long block) {
  return std::max(1L, std::min((TASKS + heads - 1) / std::max(1L, heads), (length + block - 1) / block));
}

using Array3 = ffi::Buffer<ffi::F32, 3>;
using Result3 = ffi::Result<Array3>;

// Head h of example b of [batch, length, heads * channels].
Head head(Array3& x, long b, long h, long heads) {
  auto shape = x.dimensions();
  long stride = shape[2], channels = stride / heads;
  return {x.typed_data() + b * shape[1] * stride + h * channels, stride, channels};
}

float* place(Result3& x, long b, long h, long heads) { return const_cast<float*>(head(*x, b, h, heads).data); }

ffi::Error forward(ffi::ThreadPool pool, Array3 query, Array3 key, Array3 value, Result3 out, Result3 lse,
                   int64_t heads) {
  long batch = query.dimensions()[0], queries = query.dimensions()[1], keys = key.dimensions()[1];
  long parts = parts_of(batch * heads, queries, QUERIES);
  long rows = round_up((queries + parts - 1) / parts, ROWS);
  in_parallel(pool, batch * heads * parts, [&](long task) {
    long part = task % parts, h = task / parts % heads, b = task / parts / heads;
    long first = std::min(part * rows, queries), last = std::min(first + rows, queries);
    forward_task(head(query, b, h, heads), head(key, b, h, heads), head(value, b, h, heads), first, last, keys,
                 place(out, b, h, heads), lse->typed_data() + (b * heads + h) * queries);
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Array3 query, Array3 key, Array3 value, Array3 output, Array3 cotangent,
                    Array3 lse, Result3 of_query, Result3 of_key, Result3 of_value, int64_t heads) {
  long batch = query.dimensions()[0], queries = query.dimensions()[1], keys = key.dimensions()[1];
  long channels = query.dimensions()[2] / heads, width = round_up(channels, COLS);
  long parts = parts_of(batch * heads, keys, KEYS);
  long size = round_up((keys + parts - 1) / parts, COLS), rows = round_up(queries, ROWS);
  std::vector<float> terms(batch * heads * parts * rows * width);
  in_parallel(pool, batch * heads * parts, [&](long task) {
    long part = task % parts, h = task / parts % heads, b = task / parts / heads;
    long first = std::min(part * size, keys), last = std::min(first + size, keys);
    backward_task(head(query, b, h, heads), head(key, b, h, heads), head(value, b, h, heads),
                  head(output, b, h, heads), head(cotangent, b, h, heads),
                  lse.typed_data() + (b * heads + h) * queries, queries, first, last,
                  &terms[task * rows * width], place(of_key, b, h, heads), place(of_value, b, h, heads));
  });
  in_parallel(pool, batch * heads, [&](long task) {
    float* out = place(of_query, task / heads, task % heads, heads);
    for (long i = 0; i < queries; ++i)
      for (long c = 0; c < channels; ++c) {
        float sum = 0;
        for (long part = 0; part < parts; ++part) sum += terms[((task * parts + part) * rows + i) * width + c];
        out[i * heads * channels + c] = sum / std::sqrt(float(channels));
      }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Ret<Array3>()
                                  .Ret<Array3>()
                                  .Attr<int64_t>("heads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Ret<Array3>()
                                  .Ret<Array3>()
                                  .Ret<Array3>()
                                  .Attr<int64_t>("heads"));
