// Softmax attention on CPUs in float32, forward and backward. native.py builds and calls it.
//
// The logits never leave the caches. For each block of keys, the keys are copied in the order in which the inner
// loop reads them, and all queries are multiplied with them. Every query has a running maximum and a running sum
// instead of a whole row of logits. Tasks write to different memory, and the split of the work depends on shapes
// only, so results do not depend on the number of threads.

#include <cmath>

#include "lanes.h"

namespace structvit {
namespace {

// The registers hold a tile of ROWS x PAIR values of a matrix product. KEYS is the largest number of keys per block,
// a multiple of ROWS and PAIR.
#ifdef __AVX512F__
constexpr long ROWS = 12, KEYS = 288;
#else
constexpr long ROWS = 6, KEYS = 240;
#endif
constexpr long GROUP = 2 * ROWS;  // queries that are multiplied with a block of keys at a time, in the forward pass
constexpr long QUERIES = 60;      // largest number of queries per block in the backward pass; a multiple of ROWS
constexpr float LOWEST = -INFINITY, LOG2_E = 1.44269504f;

// Returns the length of the blocks into which to split `length`: a multiple of `unit`, and at most `most`, which is
// one too. Only the last block may be shorter.
long block_of(long length, long most, long unit) {
  return round_up(ceil_div(length, std::max(1L, ceil_div(length, most))), unit);
}

// Returns 2^x, exact to a few units in the last place; nearly zero for x below -126.
Lanes exp2(Lanes x) {
  Lanes shifter = all(12582912.f + 127.f);  // 1.5 * 2^23 + 127: the low bits of x + shifter are 127 + round(x)
  Lanes low = all(-126.f);
  Lanes y = low > x ? low : x;
  Lanes sum = y + shifter, r = y - (sum - shifter);
  Lanes p = all(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.f;
  return p * (Lanes)((Bits)sum << 23);
}

// Computes a tile of a matrix product in registers, for rows r < ROWS and columns < PAIR: the sum over k < depth of
// a[r * row + k * step] * b[k * PAIR + column]. Calls finish(r, left, right) with the two halves of each row.
template <class Finish>
INLINE void tile(const float* a, long row, long step, const float* b, long depth, Finish finish) {
  Lanes left[ROWS] = {}, right[ROWS] = {};
  for (long k = 0; k < depth; ++k) {
    Lanes b0 = load(b + k * PAIR), b1 = load(b + k * PAIR + LANES);
#pragma GCC unroll 12
    for (long r = 0; r < ROWS; ++r) {
      Lanes x = all(a[r * row + k * step]);
      left[r] += x * b0;
      right[r] += x * b1;
    }
  }
#pragma GCC unroll 12
  for (long r = 0; r < ROWS; ++r) finish(r, left[r], right[r]);
}

// Returns a `finish` for `tile` that adds the rows to c, whose rows are `width` long.
INLINE auto adder(float* c, long width) {
  return [=](long r, Lanes left, Lanes right) {
    store(c + r * width, load(c + r * width) + left);
    store(c + r * width + LANES, load(c + r * width + LANES) + right);
  };
}

// One head of an array: row i has `channels` values, starting at i * stride.
struct Head {
  const float* data;
  long stride, channels;

  const float* row(long i) const { return data + i * stride; }

  // Copies `count` rows from `first` on, times scale, into to[rows][width]; the rest of `to` becomes zero.
  void copy(long first, long count, float* to, long rows, long width, float scale = 1.f) const {
    std::fill_n(to, rows * width, 0.f);
    for (long i = 0; i < count; ++i) {
      const float* from = row(first + i);
      for (long c = 0; c < channels; ++c) to[i * width + c] = scale * from[c];
    }
  }

  // Copies these rows as panels of columns, to[width / PAIR][count][PAIR], the layout of `b` in `tile`.
  void panels(long first, long count, float* to, long width, float scale = 1.f) const {
    for (long j = 0; j < width; j += PAIR)
      for (long i = 0; i < count; ++i, to += PAIR) {
        const float* from = row(first + i) + j;
        if (j + PAIR <= channels) {
          store(to, load(from) * scale);
          store(to + LANES, load(from + LANES) * scale);
        } else {
          for (long c = 0; c < PAIR; ++c) to[c] = j + c < channels ? scale * from[c] : 0.f;
        }
      }
  }

  // Copies the transpose of these rows as panels, to[count / PAIR, rounded up][channels][PAIR]. After the last row, it
  // repeats this row.
  void transposed(long first, long count, float* to) const {
    for (long j = 0; j < count; j += PAIR, to += PAIR * channels) {
      const float* rows[PAIR];
      for (long i = 0; i < PAIR; ++i) rows[i] = row(first + std::min(j + i, count - 1));
      for (long c = 0; c < channels; ++c)
        for (long i = 0; i < PAIR; ++i) to[c * PAIR + i] = rows[i][c];
    }
  }
};

// Computes one task: queries [first, last) of a head. `out` has the strides of the queries, `lse` one value per
// query.
void forward_task(Head query, Head key, Head value, long first, long last, long keys, float* out, float* lse) {
  long channels = query.channels, width = round_up(channels, PAIR), rows = round_up(last - first, ROWS);
  Floats q(rows * width), sum = zeros(rows * width), total = zeros(rows), top(rows);
  Floats k(channels * KEYS), v(KEYS * width), weights(GROUP * KEYS);
  std::fill_n(top.data(), rows, LOWEST);
  query.copy(first, last - first, q.data(), rows, width, LOG2_E / std::sqrt(float(channels)));
  long block = block_of(keys, KEYS, PAIR);
  for (long at = 0; at < keys; at += block) {
    long count = std::min(block, keys - at), padded = round_up(count, PAIR);
    key.transposed(at, count, k.data());
    value.panels(at, count, v.data(), width);
    for (long i = 0; i < rows; i += GROUP) {
      long rows_here = std::min(GROUP, rows - i);
      for (long j = 0; j < padded; j += PAIR)
        for (long r = 0; r < rows_here; r += ROWS) {
          float* w = &weights[r * KEYS + j];
          tile(&q[(i + r) * width], width, 1, &k[j * channels], channels, [=](long r, Lanes left, Lanes right) {
            store(w + r * KEYS, left);
            store(w + r * KEYS + LANES, right);
          });
        }
      for (long r = 0; r < rows_here; ++r) {
        float* w = &weights[r * KEYS];
        for (long j = count; j < padded; ++j) w[j] = LOWEST;
        Lanes most = load(w);
        for (long j = LANES; j < padded; j += LANES) {
          Lanes x = load(w + j);
          most = most > x ? most : x;
        }
        float highest = top[i + r];
        for (long l = 0; l < LANES; ++l) highest = std::max(highest, most[l]);
        Lanes sums{};
        for (long j = 0; j < padded; j += LANES) {
          Lanes e = exp2(load(w + j) - highest);
          store(w + j, e);
          sums += e;
        }
        float shrink = std::exp2(top[i + r] - highest), added = 0;
        for (long l = 0; l < LANES; ++l) added += sums[l];
        top[i + r] = highest;
        total[i + r] = total[i + r] * shrink + added;
        if (shrink != 1.f)
          for (long c = 0; c < width; c += LANES)
            store(&sum[(i + r) * width + c], load(&sum[(i + r) * width + c]) * shrink);
      }
      for (long c = 0; c < width; c += PAIR)
        for (long r = 0; r < rows_here; r += ROWS)
          tile(&weights[r * KEYS], KEYS, 1, &v[c * count], count, adder(&sum[(i + r) * width + c], width));
    }
  }
  for (long i = 0; i < last - first; ++i) {
    for (long c = 0; c < channels; ++c) out[(first + i) * query.stride + c] = sum[i * width + c] / total[i];
    lse[first + i] = top[i] / LOG2_E + std::log(total[i]);
  }
}

// Computes one task: keys [first, last) of a head. Writes the gradients of these keys and values, with their strides.
// Writes the contribution of these keys to the gradient of all queries into d_query[rows][width], which must be zero
// before.
void backward_task(Head query, Head key, Head value, Head output, Head cotangent, const float* lse, long queries,
                   long first, long last, float* d_query, float* d_key, float* d_value) {
  long channels = query.channels, width = round_up(channels, PAIR);
  float scale = 1 / std::sqrt(float(channels));
  Floats k(KEYS * width), k_transposed(channels * KEYS), v_transposed(channels * KEYS);
  Floats d_k(KEYS * width), d_v(KEYS * width), q(QUERIES * width), g(QUERIES * width);
  Floats q_panels(QUERIES * width), g_panels(QUERIES * width);
  Floats weights(QUERIES * KEYS), slopes(QUERIES * KEYS), delta = zeros(queries);
  for (long i = 0; i < queries; ++i)
    for (long c = 0; c < channels; ++c) delta[i] += output.row(i)[c] * cotangent.row(i)[c];
  long block = block_of(last - first, KEYS, PAIR), group = block_of(queries, QUERIES, ROWS);
  for (long at = first; at < last; at += block) {
    long count = std::min(block, last - at), wide = round_up(count, PAIR), tall = round_up(count, ROWS);
    key.panels(at, count, k.data(), width);
    key.transposed(at, count, k_transposed.data());
    value.transposed(at, count, v_transposed.data());
    std::fill_n(d_k.data(), KEYS * width, 0.f);
    std::fill_n(d_v.data(), KEYS * width, 0.f);
    for (long i = 0; i < queries; i += group) {
      long rows_here = std::min(group, queries - i), rows = round_up(rows_here, ROWS);
      query.copy(i, rows_here, q.data(), rows, width, scale * LOG2_E);
      cotangent.copy(i, rows_here, g.data(), rows, width);
      query.panels(i, rows_here, q_panels.data(), width, scale);
      cotangent.panels(i, rows_here, g_panels.data(), width);
      for (long j = 0; j < wide; j += PAIR)
        for (long r = 0; r < rows; r += ROWS) {
          float *w = &weights[r * KEYS + j], *s = &slopes[r * KEYS + j];
          float row_lse[ROWS], row_delta[ROWS];
          for (long n = 0; n < ROWS; ++n) {
            bool real = r + n < rows_here;
            row_lse[n] = real ? lse[i + r + n] * LOG2_E : -LOWEST;
            row_delta[n] = real ? delta[i + r + n] : 0.f;
          }
          tile(&q[r * width], width, 1, &k_transposed[j * channels], channels, [&](long r, Lanes left, Lanes right) {
            store(w + r * KEYS, exp2(left - row_lse[r]));
            store(w + r * KEYS + LANES, exp2(right - row_lse[r]));
          });
          tile(&g[r * width], width, 1, &v_transposed[j * channels], channels, [&](long r, Lanes left, Lanes right) {
            store(s + r * KEYS, load(w + r * KEYS) * (left - row_delta[r]));
            store(s + r * KEYS + LANES, load(w + r * KEYS + LANES) * (right - row_delta[r]));
          });
        }
      for (long r = 0; r < rows; ++r)
        for (long j = count; j < std::max(wide, tall); ++j) weights[r * KEYS + j] = slopes[r * KEYS + j] = 0.f;
      for (long c = 0; c < width; c += PAIR)
        for (long r = 0; r < rows; r += ROWS)
          tile(&slopes[r * KEYS], KEYS, 1, &k[c * count], count, adder(&d_query[(i + r) * width + c], width));
      for (long j = 0; j < tall; j += ROWS)
        for (long c = 0; c < width; c += PAIR) {
          tile(&weights[j], 1, KEYS, &g_panels[c * rows_here], rows_here, adder(&d_v[j * width + c], width));
          tile(&slopes[j], 1, KEYS, &q_panels[c * rows_here], rows_here, adder(&d_k[j * width + c], width));
        }
    }
    for (long j = 0; j < count; ++j)
      for (long c = 0; c < channels; ++c) {
        d_key[(at + j) * key.stride + c] = d_k[j * width + c];
        d_value[(at + j) * key.stride + c] = d_v[j * width + c];
      }
  }
}

// Returns into how many parts to split each head, for at least TASKS tasks in all, but at most one part per block.
long parts_of(long heads, long length, long block) {
  return std::max(1L, std::min(ceil_div(TASKS, std::max(1L, heads)), ceil_div(length, block)));
}

using Array3 = ffi::Buffer<ffi::F32, 3>;
using Result3 = ffi::Result<Array3>;

// Returns head h of example b of [batch, length, heads * channels].
Head head(Array3& x, long b, long h, long heads) {
  auto shape = x.dimensions();
  long stride = shape[2], channels = stride / heads;
  return {x.typed_data() + b * shape[1] * stride + h * channels, stride, channels};
}

float* mutable_head(Result3& x, long b, long h, long heads) { return const_cast<float*>(head(*x, b, h, heads).data); }

ffi::Error forward(ffi::ThreadPool pool, Array3 query, Array3 key, Array3 value, Result3 out, Result3 lse,
                   int64_t heads) {
  long batch = query.dimensions()[0], queries = query.dimensions()[1], keys = key.dimensions()[1];
  long parts = parts_of(batch * heads, queries, QUERIES);
  long rows = round_up(ceil_div(queries, parts), ROWS);
  auto of_part = [&](long task) {
    long part = task % parts, h = task / parts % heads, b = task / parts / heads;
    long first = std::min(part * rows, queries), last = std::min(first + rows, queries);
    forward_task(head(query, b, h, heads), head(key, b, h, heads), head(value, b, h, heads), first, last, keys,
                 mutable_head(out, b, h, heads), lse->typed_data() + (b * heads + h) * queries);
  };
  in_parallel(pool, batch * heads * parts, [&] { return of_part; });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Array3 query, Array3 key, Array3 value, Array3 output, Array3 cotangent,
                    Array3 lse, Result3 d_query, Result3 d_key, Result3 d_value, int64_t heads) {
  long batch = query.dimensions()[0], queries = query.dimensions()[1], keys = key.dimensions()[1];
  long channels = query.dimensions()[2] / heads, width = round_up(channels, PAIR);
  long parts = parts_of(batch * heads, keys, KEYS);
  long size = round_up(ceil_div(keys, parts), PAIR), rows = round_up(queries, ROWS);
  Floats terms = zeros(batch * heads * parts * rows * width);
  auto of_part = [&](long task) {
    long part = task % parts, h = task / parts % heads, b = task / parts / heads;
    long first = std::min(part * size, keys), last = std::min(first + size, keys);
    backward_task(head(query, b, h, heads), head(key, b, h, heads), head(value, b, h, heads),
                  head(output, b, h, heads), head(cotangent, b, h, heads),
                  lse.typed_data() + (b * heads + h) * queries, queries, first, last,
                  &terms[task * rows * width], mutable_head(d_key, b, h, heads), mutable_head(d_value, b, h, heads));
  };
  in_parallel(pool, batch * heads * parts, [&] { return of_part; });
  auto sum_of_parts = [&](long task) {
    float* out = mutable_head(d_query, task / heads, task % heads, heads);
    for (long i = 0; i < queries; ++i)
      for (long c = 0; c < channels; ++c) {
        float sum = 0;
        for (long part = 0; part < parts; ++part) sum += terms[((task * parts + part) * rows + i) * width + c];
        out[i * heads * channels + c] = sum / std::sqrt(float(channels));
      }
  };
  in_parallel(pool, batch * heads, [&] { return sum_of_parts; });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace structvit

using namespace structvit;

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
