// Depthwise convolution on CPUs, float32, forward and both gradients: what native.py builds and calls.
//
// The work is cut into units, a few channels of some rows of one example each, whose windows' sight is copied into
// an array with zeros around it, where these channels lie side by side: no inner loop knows a border, and none
// leaves the caches. All three operations are sums of products over taps or over places, seven at a time in
// registers.

#include "lanes.h"

namespace structvit {
namespace {

constexpr long MOST = 7;           // sums at a time, each a pair wide; grids of vision models divide by 7
constexpr long ROOM = 96 * 1024;   // floats that a unit's copies take, unless four rows take more
constexpr long PLACES = 56;        // that sums over places stay in registers for, at least
constexpr long AHEAD = 16;         // places that are fetched before they are copied

struct Shape {  // of one example
  long frames, rows, columns, channels;

  long size() const { return frames * rows * columns * channels; }
  long at(long frame, long row, long column) const { return ((frame * rows + row) * columns + column) * channels; }
};

struct Window {
  long frames, rows, columns;

  long taps() const { return frames * rows * columns; }
};

struct Unit {
  long example, channel, first, last;  // channels from, and rows [first, last)
};

// How windows of every `stride`-th row and column of a grid are cut into units.
struct Cut {
  Shape grid;  // of the windows' centres
  Window window;
  long batch, stride, rows = 0, parts = 0;
  Shape seen{};  // what a unit's windows see

  // A unit holds so many copies, and so many other floats for each of its rows.
  Cut(long batch, Shape grid, Window window, long stride, long copies, long others = 0)
      : grid(grid), window(window), batch(batch), stride(stride) {
    seen = {grid.frames + window.frames - 1, stride,
            round_up((grid.columns - 1) * stride + window.columns, stride), PAIR};
    long shared = std::min(grid.rows, ceil_div(TASKS, std::max(1L, batch * blocks())));
    rows = std::min(ceil_div(grid.rows, std::max(1L, shared)), std::max(4L, ROOM / (copies * seen.size() + others)));
    rows = std::max(1L, rows);
    parts = ceil_div(grid.rows, rows);
    seen.rows = (rows - 1) * stride + window.rows;
  }

  // The same units of an array that has one place for each window.
  Cut of_centres() const {
    Cut cut = *this;
    cut.window = {1, 1, 1}, cut.stride = 1, cut.seen = {grid.frames, rows, grid.columns, PAIR};
    return cut;
  }

  long blocks() const { return ceil_div(grid.channels, PAIR); }
  long units_of_block() const { return batch * parts; }
  long units() const { return blocks() * units_of_block(); }

  // Of a block of channels, one of its units.
  Unit unit(long block, long i) const {
    long first = i % parts * rows;
    return {i / parts, block * PAIR, first, std::min(first + rows, grid.rows)};
  }

  // Blocks follow each other: what lies side by side in memory is read and written within a short time.
  Unit unit(long task) const { return unit(task % blocks(), task / blocks()); }

  long lanes(Unit unit) const { return std::min(PAIR, grid.channels - unit.channel); }

  // Columns in an order in which those that a stride takes follow each other.
  long folded(long column) const { return column % stride * (seen.columns / stride) + column / stride; }

  // Where each tap lies in what a window sees.
  std::vector<long> offsets() const {
    std::vector<long> all;
    for (long t = 0; t < window.frames; ++t)
      for (long y = 0; y < window.rows; ++y)
        for (long x = 0; x < window.columns; ++x) all.push_back(seen.at(t, y, folded(x)));
    return all;
  }

  // What the unit's windows see of one example of `from`, whose rows and columns are spread to every `spread`-th.
  void copy(const float* from, Shape shape, Unit unit, long spread, float* to) const {
    long line = seen.columns * PAIR, some = lanes(unit), before = (window.columns - 1) / 2;
    long columns = std::min(shape.columns, ceil_div(seen.columns - before, spread));  // no window sees the others
    bool dense = spread == 1 && stride == 1 && some == PAIR;
    for (long frame = 0; frame < seen.frames; ++frame)
      for (long row = 0; row < seen.rows; ++row, to += line) {
        long t = frame - (window.frames - 1) / 2, y = unit.first * stride + row - (window.rows - 1) / 2;
        if (t < 0 || t >= shape.frames || y < 0 || y % spread || y / spread >= shape.rows) {
          std::fill_n(to, line, 0.f);
          continue;
        }
        const float* in = from + shape.at(t, y / spread, 0) + unit.channel;
        if (dense) {
          float* out = std::fill_n(to, before * PAIR, 0.f);
          for (long x = 0; x < shape.columns; ++x, in += shape.channels, out += PAIR) {
            __builtin_prefetch(in + AHEAD * shape.channels);
            store(out, load(in));
            store(out + LANES, load(in + LANES));
          }
          std::fill(out, to + line, 0.f);
        } else {
          std::fill_n(to, line, 0.f);
          for (long x = 0; x < columns; ++x, in += shape.channels)
            std::copy_n(in, some, to + folded(x * spread + before) * PAIR);
        }
      }
  }
};

// out[x] = start + sum over taps of from[offsets[tap] + x] * weights[tap], all of them pairs; out's are `apart`, and
// `lanes` of each are written.
template <long COUNT>
void over_taps(const float* from, const std::vector<long>& offsets, const float* weights, const float* start, float* out,
               long apart, long lanes) {
  Lanes left[COUNT], right[COUNT];
#pragma GCC unroll 7
  for (long x = 0; x < COUNT; ++x) {
    __builtin_prefetch(out + x * apart, 1);
    left[x] = load(start);
    right[x] = load(start + LANES);
  }
  for (size_t tap = 0; tap < offsets.size(); ++tap) {
    const float* in = from + offsets[tap];
    Lanes w0 = load(weights + tap * PAIR), w1 = load(weights + tap * PAIR + LANES);
#pragma GCC unroll 7
    for (long x = 0; x < COUNT; ++x) {
      left[x] += load(in + x * PAIR) * w0;
      right[x] += load(in + x * PAIR + LANES) * w1;
    }
  }
#pragma GCC unroll 7
  for (long x = 0; x < COUNT; ++x) {
    if (lanes == PAIR) {
      store(out + x * apart, left[x]);
      store(out + x * apart + LANES, right[x]);
    } else {
      float sums[PAIR];
      store(sums, left[x]);
      store(sums + LANES, right[x]);
      std::copy_n(sums, lanes, out + x * apart);
    }
  }
}

// sums[tap] += sum over rows and columns of from[offsets[tap] + row * line + column] * with[row][column], all of them
// pairs; line in floats.
template <long COUNT>
void over_places(const float* from, long line, const long* offsets, const float* with, long rows, long columns,
                 float* sums) {
  Lanes left[COUNT], right[COUNT];
#pragma GCC unroll 7
  for (long k = 0; k < COUNT; ++k) {
    left[k] = load(sums + k * PAIR);
    right[k] = load(sums + k * PAIR + LANES);
  }
  for (long y = 0; y < rows; ++y)
    for (long x = 0; x < columns; ++x, with += PAIR) {
      const float* in = from + y * line + x * PAIR;
      Lanes g0 = load(with), g1 = load(with + LANES);
#pragma GCC unroll 7
      for (long k = 0; k < COUNT; ++k) {
        left[k] += load(in + offsets[k]) * g0;
        right[k] += load(in + offsets[k] + LANES) * g1;
      }
    }
#pragma GCC unroll 7
  for (long k = 0; k < COUNT; ++k) {
    store(sums + k * PAIR, left[k]);
    store(sums + k * PAIR + LANES, right[k]);
  }
}

constexpr decltype(&over_taps<1>) OVER_TAPS[] = {nullptr,      over_taps<1>, over_taps<2>, over_taps<3>,
                                                 over_taps<4>, over_taps<5>, over_taps<6>, over_taps<MOST>};
constexpr decltype(&over_places<1>) OVER_PLACES[] = {nullptr,        over_places<1>, over_places<2>, over_places<3>,
                                                     over_places<4>, over_places<5>, over_places<6>, over_places<MOST>};

// Calls part(first, count) for as few parts of at most MOST as there can be, and as alike.
template <class Part>
void in_parts(long length, Part part) {
  long parts = ceil_div(length, MOST);
  for (long i = 0; i < parts; ++i) part(length * i / parts, length * (i + 1) / parts - length * i / parts);
}

// The taps of the channels that a thread works on, [planes][taps][PAIR] for each block of them.
class Weights {
  const float* kernel;  // [taps][channels][planes]
  long taps, channels, planes, size = planes * taps * PAIR;
  bool reversed;
  Floats made{ceil_div(channels, PAIR) * size};
  std::vector<bool> ready = std::vector<bool>(ceil_div(channels, PAIR));

 public:
  Weights(const float* kernel, long taps, long channels, long planes, bool reversed)
      : kernel(kernel), taps(taps), channels(channels), planes(planes), reversed(reversed) {}

  const float* of(long channel) {
    float* block = made.data() + channel / PAIR * size;
    if (ready[channel / PAIR]) return block;
    ready[channel / PAIR] = true;
    std::fill_n(block, size, 0.f);
    for (long tap = 0; tap < taps; ++tap)
      for (long c = channel; c < std::min(channels, channel + PAIR); ++c)
        for (long d = 0; d < planes; ++d)
          block[(d * taps + (reversed ? taps - 1 - tap : tap)) * PAIR + c - channel] =
              kernel[(tap * channels + c) * planes + d];
    return block;
  }
};

// Arrays: x [batch, *grid, channels], kernels [*window, channels, planes], bias [channels, planes], and results with
// their cotangents [batch, planes, *grid, channels]. Images are clips of one frame.
using Array = ffi::AnyBuffer;
using Result = ffi::Result<Array>;

Shape shape_of(const Array& x, size_t before) {
  auto d = x.dimensions();
  return {d.size() == before + 4 ? d[before] : 1, d[d.size() - 3], d[d.size() - 2], d[d.size() - 1]};
}

Window window_of(const Array& kernel) {
  auto d = kernel.dimensions();
  return {d.size() == 5 ? d[0] : 1, d[d.size() - 4], d[d.size() - 3]};
}

long planes_of(const Array& kernel) { return kernel.dimensions().back(); }

const float* data(const Array& x) { return x.typed_data<float>(); }

// [planes][channels], a whole number of pairs of these.
Floats padded_bias(const Array& bias, long channels, long planes) {
  long line = round_up(channels, PAIR);
  Floats made = zeros(planes * line);
  for (long c = 0; c < channels; ++c)
    for (long d = 0; d < planes; ++d) made[d * line + c] = data(bias)[c * planes + d];
  return made;
}

ffi::Error forward(ffi::ThreadPool pool, Array x, Array kernel, Array bias, Result out, int64_t stride) {
  Shape in = shape_of(x, 1), made = shape_of(*out, 2);
  Window window = window_of(kernel);
  long planes = planes_of(kernel);
  Cut cut(x.dimensions()[0], made, window, stride, 1);
  auto offsets = cut.offsets();
  Floats starts = padded_bias(bias, in.channels, planes);
  long line = round_up(in.channels, PAIR);
  in_parallel(pool, cut.units(), [&] {
    Weights weights(data(kernel), window.taps(), in.channels, planes, false);
    return [&, weights = std::move(weights), seen = Floats(cut.seen.size())](long task) mutable {
      Unit unit = cut.unit(task);
      cut.copy(data(x) + unit.example * in.size(), in, unit, 1, seen.data());
      const float* taps = weights.of(unit.channel);
      float* to = out->typed_data<float>() + unit.example * planes * made.size() + unit.channel;
      in_parts(made.columns, [&](long at, long count) {
        for (long t = 0; t < made.frames; ++t)
          for (long y = unit.first; y < unit.last; ++y)
            for (long d = 0; d < planes; ++d)
              OVER_TAPS[count](&seen[cut.seen.at(t, (y - unit.first) * stride, at)], offsets,
                               taps + d * window.taps() * PAIR, &starts[d * line + unit.channel],
                               to + d * made.size() + made.at(t, y, at), made.channels, cut.lanes(unit));
      });
    };
  });
  return ffi::Error::Success();
}

// The same on the cotangent spread to x's grid, with the window reversed; its planes are further taps.
ffi::Error of_input(ffi::ThreadPool pool, Array cotangent, Array kernel, Result out, int64_t stride) {
  Shape given = shape_of(cotangent, 2), made = shape_of(*out, 1);
  Window window = window_of(kernel);
  long planes = planes_of(kernel);
  Cut cut(out->dimensions()[0], made, window, 1, planes);
  Floats start = zeros(PAIR);
  std::vector<long> offsets;
  for (long d = 0; d < planes; ++d)
    for (long offset : cut.offsets()) offsets.push_back(d * cut.seen.size() + offset);
  in_parallel(pool, cut.units(), [&] {
    Weights weights(data(kernel), window.taps(), made.channels, planes, true);
    return [&, weights = std::move(weights), seen = Floats(planes * cut.seen.size())](long task) mutable {
      Unit unit = cut.unit(task);
      const float* from = data(cotangent) + unit.example * planes * given.size();
      for (long d = 0; d < planes; ++d)
        cut.copy(from + d * given.size(), given, unit, stride, &seen[d * cut.seen.size()]);
      const float* taps = weights.of(unit.channel);
      float* to = out->typed_data<float>() + unit.example * made.size() + unit.channel;
      in_parts(made.columns, [&](long at, long count) {
        for (long t = 0; t < made.frames; ++t)
          for (long y = unit.first; y < unit.last; ++y)
            OVER_TAPS[count](&seen[cut.seen.at(t, y - unit.first, at)], offsets, taps, start.data(),
                             to + made.at(t, y, at), made.channels, cut.lanes(unit));
      });
    };
  });
  return ffi::Error::Success();
}

ffi::Error of_kernel(ffi::ThreadPool pool, Array x, Array cotangent, Result out, int64_t stride) {
  Shape in = shape_of(x, 1), given = shape_of(cotangent, 2);
  Window window = window_of(*out);
  long planes = planes_of(*out), taps = window.taps(), size = planes * taps * PAIR;
  Cut cut(x.dimensions()[0], given, window, stride, 1, given.frames * given.columns * PAIR);
  Cut centres = cut.of_centres();
  auto offsets = cut.offsets();
  long units = cut.units_of_block(), groups = std::min(units, ceil_div(TASKS, cut.blocks()));
  long step = std::min(cut.rows, ceil_div(PLACES, given.columns));
  Floats sums = zeros(cut.blocks() * groups * size);  // of every group of units apart
  in_parallel(pool, cut.blocks() * groups, [&] {
    return [&, seen = Floats(cut.seen.size()), with = Floats(centres.seen.size())](long task) mutable {
      long block = task / groups, group = task % groups;
      for (long i = units * group / groups; i < units * (group + 1) / groups; ++i) {
        Unit unit = cut.unit(block, i);
        cut.copy(data(x) + unit.example * in.size(), in, unit, 1, seen.data());
        for (long d = 0; d < planes; ++d) {
          const float* from = data(cotangent) + (unit.example * planes + d) * given.size();
          centres.copy(from, given, unit, 1, with.data());
          for (long t = 0; t < given.frames; ++t)
            for (long y = 0; y < unit.last - unit.first; y += step)
              in_parts(taps, [&](long at, long count) {
                OVER_PLACES[count](&seen[cut.seen.at(t, y * stride, 0)], cut.seen.at(0, stride, 0), &offsets[at],
                                   &with[centres.seen.at(t, y, 0)], std::min(step, unit.last - unit.first - y),
                                   given.columns, &sums[task * size + (d * taps + at) * PAIR]);
              });
        }
      }
    };
  });
  for (long tap = 0; tap < taps; ++tap)
    for (long c = 0; c < in.channels; ++c)
      for (long d = 0; d < planes; ++d) {
        float sum = 0;
        for (long group = 0; group < groups; ++group)
          sum += sums[(c / PAIR * groups + group) * size + (d * taps + tap) * PAIR + c % PAIR];
        out->typed_data<float>()[(tap * in.channels + c) * planes + d] = sum;
      }
  return ffi::Error::Success();
}

auto with_pool() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }
auto binding() { return with_pool().Arg<Array>().Arg<Array>().Ret<Array>().Attr<int64_t>("stride"); }
auto forward_binding() {
  return with_pool().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Attr<int64_t>("stride");
}

}  // namespace
}  // namespace structvit

using namespace structvit;

XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_forward, forward, forward_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_of_input, of_input, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_of_kernel, of_kernel, binding());
