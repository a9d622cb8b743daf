// Depthwise convolution on CPUs in float32: the forward pass and both gradients. native.py builds and calls it.
//
// The work is split into units: a few channels of some output rows of one example. The inputs of a unit are copied
// into a buffer that is padded with zeros and has these channels next to each other. So no inner loop has to handle
// borders, and its data stay in the caches. All three operations are sums of products over taps or positions; seven
// sums at a time are in registers.

#include "lanes.h"

namespace structvit {
namespace {

constexpr long MAX_SUMS = 7;             // sums at a time, each PAIR wide; 7 divides most grid sizes of vision models
constexpr long MAX_BUFFER = 96 * 1024;   // most floats in the buffers of a unit, unless four rows need more
constexpr long MIN_POSITIONS = 56;       // least number of positions to sum before sums leave the registers
constexpr long PREFETCH = 16;            // how many positions ahead the copy prefetches

struct Shape {  // shape of one example
  long frames, rows, columns, channels;

  long size() const { return frames * rows * columns * channels; }
  long at(long frame, long row, long column) const { return ((frame * rows + row) * columns + column) * channels; }
};

struct Window {
  long frames, rows, columns;

  long taps() const { return frames * rows * columns; }
};

struct Unit {
  long example, channel, first, last;  // PAIR channels from `channel` on, rows [first, last) of window centres
};

// The split of a convolution into units.
struct Split {
  Shape grid;  // shape of the window centres
  Window window;
  long batch, stride, rows = 0, parts = 0;  // rows of a unit; parts into which the rows of an example are split
  Shape buffer{};  // shape of the inputs of a unit

  // A unit has `copies` buffers of inputs, and `others` other floats per row.
  Split(long batch, Shape grid, Window window, long stride, long copies, long others = 0)
      : grid(grid), window(window), batch(batch), stride(stride) {
    buffer = {grid.frames + window.frames - 1, stride,
              round_up((grid.columns - 1) * stride + window.columns, stride), PAIR};
    long shared = std::min(grid.rows, ceil_div(TASKS, std::max(1L, batch * blocks())));
    long limit = std::max(4L, MAX_BUFFER / (copies * buffer.size() + others));
    rows = std::max(1L, std::min(ceil_div(grid.rows, std::max(1L, shared)), limit));
    parts = ceil_div(grid.rows, rows);
    buffer.rows = (rows - 1) * stride + window.rows;
  }

  // Returns the same units for an array with one value per window, such as the cotangent.
  Split of_centres() const {
    Split split = *this;
    split.window = {1, 1, 1}, split.stride = 1, split.buffer = {grid.frames, rows, grid.columns, PAIR};
    return split;
  }

  long blocks() const { return ceil_div(grid.channels, PAIR); }
  long units_of_block() const { return batch * parts; }
  long units() const { return blocks() * units_of_block(); }

  // Returns unit i of a block of PAIR channels.
  Unit unit(long block, long i) const {
    long first = i % parts * rows;
    return {i / parts, block * PAIR, first, std::min(first + rows, grid.rows)};
  }

  // Orders units with the blocks of channels innermost, so that neighbouring memory is accessed in a short time.
  Unit unit(long task) const { return unit(task % blocks(), task / blocks()); }

  long lanes(Unit unit) const { return std::min(PAIR, grid.channels - unit.channel); }

  // Reorders columns so that the ones that a tap reads, `stride` apart, become adjacent.
  long folded(long column) const { return column % stride * (buffer.columns / stride) + column / stride; }

  // Returns the offset of each tap in the buffer, relative to the first tap of a window.
  std::vector<long> offsets() const {
    std::vector<long> all;
    for (long t = 0; t < window.frames; ++t)
      for (long y = 0; y < window.rows; ++y)
        for (long x = 0; x < window.columns; ++x) all.push_back(buffer.at(t, y, folded(x)));
    return all;
  }

  // Copies the inputs of a unit from one example, `from`, with spread - 1 zeros between its rows and its columns.
  void copy(const float* from, Shape shape, Unit unit, long spread, float* to) const {
    long line = buffer.columns * PAIR, count = lanes(unit), before = (window.columns - 1) / 2;
    long columns = std::min(shape.columns, ceil_div(buffer.columns - before, spread));  // no window reads the others
    bool dense = spread == 1 && stride == 1 && count == PAIR;
    for (long frame = 0; frame < buffer.frames; ++frame)
      for (long row = 0; row < buffer.rows; ++row, to += line) {
        long t = frame - (window.frames - 1) / 2, y = unit.first * stride + row - (window.rows - 1) / 2;
        if (t < 0 || t >= shape.frames || y < 0 || y % spread || y / spread >= shape.rows) {
          std::fill_n(to, line, 0.f);
          continue;
        }
        const float* in = from + shape.at(t, y / spread, 0) + unit.channel;
        if (dense) {
          float* out = std::fill_n(to, before * PAIR, 0.f);
          for (long x = 0; x < shape.columns; ++x, in += shape.channels, out += PAIR) {
            __builtin_prefetch(in + PREFETCH * shape.channels);
            store(out, load(in));
            store(out + LANES, load(in + LANES));
          }
          std::fill(out, to + line, 0.f);
        } else {
          std::fill_n(to, line, 0.f);
          for (long x = 0; x < columns; ++x, in += shape.channels)
            std::copy_n(in, count, to + folded(x * spread + before) * PAIR);
        }
      }
  }
};

// Computes out[x] = start + sum over taps of from[offsets[tap] + x] * weights[tap] for x < COUNT. All values are pairs
// of registers. Outputs are `apart` floats from each other; only `lanes` floats of each are written.
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

// Adds to sums[tap] the sum over rows and columns of from[offsets[tap] + row * line + column] * with[row][column]. All
// values are pairs of registers; `line` is in floats.
template <long COUNT>
void over_positions(const float* from, long line, const long* offsets, const float* with, long rows, long columns,
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
                                                 over_taps<4>, over_taps<5>, over_taps<6>, over_taps<MAX_SUMS>};
constexpr decltype(&over_positions<1>) OVER_POSITIONS[] = {
    nullptr,           over_positions<1>, over_positions<2>, over_positions<3>,
    over_positions<4>, over_positions<5>, over_positions<6>, over_positions<MAX_SUMS>};

// Splits `length` into the fewest parts of at most MAX_SUMS, of nearly equal size. Calls part(first, count) for each.
template <class Part>
void in_parts(long length, Part part) {
  long parts = ceil_div(length, MAX_SUMS);
  for (long i = 0; i < parts; ++i) part(length * i / parts, length * (i + 1) / parts - length * i / parts);
}

// The kernels for the channels that a thread works on: [multiplier][taps][PAIR] for each block of PAIR channels.
class Weights {
  const float* kernel;  // [taps][channels][multiplier]
  long taps, channels, multiplier, size = multiplier * taps * PAIR;
  bool reversed;
  Floats blocks{ceil_div(channels, PAIR) * size};
  std::vector<bool> ready = std::vector<bool>(ceil_div(channels, PAIR));

 public:
  Weights(const float* kernel, long taps, long channels, long multiplier, bool reversed)
      : kernel(kernel), taps(taps), channels(channels), multiplier(multiplier), reversed(reversed) {}

  const float* of(long channel) {
    float* block = blocks.data() + channel / PAIR * size;
    if (ready[channel / PAIR]) return block;
    ready[channel / PAIR] = true;
    std::fill_n(block, size, 0.f);
    for (long tap = 0; tap < taps; ++tap)
      for (long c = channel; c < std::min(channels, channel + PAIR); ++c)
        for (long d = 0; d < multiplier; ++d)
          block[(d * taps + (reversed ? taps - 1 - tap : tap)) * PAIR + c - channel] =
              kernel[(tap * channels + c) * multiplier + d];
    return block;
  }
};

// Shapes of arrays: x [batch, *grid, channels], kernel [*window, channels, multiplier], bias [channels, multiplier],
// output and its cotangent [batch, multiplier, *grid, channels]. Images are clips of one frame.
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

long multiplier_of(const Array& kernel) { return kernel.dimensions().back(); }

const float* data(const Array& x) { return x.typed_data<float>(); }

// Returns the bias as [multiplier][channels], with channels padded to a multiple of PAIR.
Floats padded_bias(const Array& bias, long channels, long multiplier) {
  long line = round_up(channels, PAIR);
  Floats padded = zeros(multiplier * line);
  for (long c = 0; c < channels; ++c)
    for (long d = 0; d < multiplier; ++d) padded[d * line + c] = data(bias)[c * multiplier + d];
  return padded;
}

ffi::Error forward(ffi::ThreadPool pool, Array x, Array kernel, Array bias, Result out, int64_t stride) {
  Shape in = shape_of(x, 1), out_shape = shape_of(*out, 2);
  Window window = window_of(kernel);
  long multiplier = multiplier_of(kernel);
  Split split(x.dimensions()[0], out_shape, window, stride, 1);
  auto offsets = split.offsets();
  Floats starts = padded_bias(bias, in.channels, multiplier);
  long line = round_up(in.channels, PAIR);
  in_parallel(pool, split.units(), [&] {
    Weights weights(data(kernel), window.taps(), in.channels, multiplier, false);
    return [&, weights = std::move(weights), buffer = Floats(split.buffer.size())](long task) mutable {
      Unit unit = split.unit(task);
      split.copy(data(x) + unit.example * in.size(), in, unit, 1, buffer.data());
      const float* taps = weights.of(unit.channel);
      float* to = out->typed_data<float>() + unit.example * multiplier * out_shape.size() + unit.channel;
      in_parts(out_shape.columns, [&](long at, long count) {
        for (long t = 0; t < out_shape.frames; ++t)
          for (long y = unit.first; y < unit.last; ++y)
            for (long d = 0; d < multiplier; ++d)
              OVER_TAPS[count](&buffer[split.buffer.at(t, (y - unit.first) * stride, at)], offsets,
                               taps + d * window.taps() * PAIR, &starts[d * line + unit.channel],
                               to + d * out_shape.size() + out_shape.at(t, y, at), out_shape.channels,
                               split.lanes(unit));
      });
    };
  });
  return ffi::Error::Success();
}

// Computes the gradient of x: the convolution of the cotangent, spread to the grid of x, with the reversed window. All
// kernels of a channel are summed like further taps.
ffi::Error input_gradient(ffi::ThreadPool pool, Array cotangent, Array kernel, Result out, int64_t stride) {
  Shape dy_shape = shape_of(cotangent, 2), out_shape = shape_of(*out, 1);
  Window window = window_of(kernel);
  long multiplier = multiplier_of(kernel);
  Split split(out->dimensions()[0], out_shape, window, 1, multiplier);
  Floats start = zeros(PAIR);
  std::vector<long> offsets;
  for (long d = 0; d < multiplier; ++d)
    for (long offset : split.offsets()) offsets.push_back(d * split.buffer.size() + offset);
  in_parallel(pool, split.units(), [&] {
    Weights weights(data(kernel), window.taps(), out_shape.channels, multiplier, true);
    return [&, weights = std::move(weights), buffer = Floats(multiplier * split.buffer.size())](long task) mutable {
      Unit unit = split.unit(task);
      const float* from = data(cotangent) + unit.example * multiplier * dy_shape.size();
      for (long d = 0; d < multiplier; ++d)
        split.copy(from + d * dy_shape.size(), dy_shape, unit, stride, &buffer[d * split.buffer.size()]);
      const float* taps = weights.of(unit.channel);
      float* to = out->typed_data<float>() + unit.example * out_shape.size() + unit.channel;
      in_parts(out_shape.columns, [&](long at, long count) {
        for (long t = 0; t < out_shape.frames; ++t)
          for (long y = unit.first; y < unit.last; ++y)
            OVER_TAPS[count](&buffer[split.buffer.at(t, y - unit.first, at)], offsets, taps, start.data(),
                             to + out_shape.at(t, y, at), out_shape.channels, split.lanes(unit));
      });
    };
  });
  return ffi::Error::Success();
}

ffi::Error kernel_gradient(ffi::ThreadPool pool, Array x, Array cotangent, Result out, int64_t stride) {
  Shape in = shape_of(x, 1), dy_shape = shape_of(cotangent, 2);
  Window window = window_of(*out);
  long multiplier = multiplier_of(*out), taps = window.taps(), size = multiplier * taps * PAIR;
  Split split(x.dimensions()[0], dy_shape, window, stride, 1, dy_shape.frames * dy_shape.columns * PAIR);
  Split centres = split.of_centres();
  auto offsets = split.offsets();
  long units = split.units_of_block(), groups = std::min(units, ceil_div(TASKS, split.blocks()));
  long step = std::min(split.rows, ceil_div(MIN_POSITIONS, dy_shape.columns));
  Floats sums = zeros(split.blocks() * groups * size);  // separate sums for every group of units
  in_parallel(pool, split.blocks() * groups, [&] {
    return [&, buffer = Floats(split.buffer.size()), with = Floats(centres.buffer.size())](long task) mutable {
      long block = task / groups, group = task % groups;
      for (long i = units * group / groups; i < units * (group + 1) / groups; ++i) {
        Unit unit = split.unit(block, i);
        split.copy(data(x) + unit.example * in.size(), in, unit, 1, buffer.data());
        for (long d = 0; d < multiplier; ++d) {
          const float* from = data(cotangent) + (unit.example * multiplier + d) * dy_shape.size();
          centres.copy(from, dy_shape, unit, 1, with.data());
          for (long t = 0; t < dy_shape.frames; ++t)
            for (long y = 0; y < unit.last - unit.first; y += step)
              in_parts(taps, [&](long at, long count) {
                OVER_POSITIONS[count](&buffer[split.buffer.at(t, y * stride, 0)], split.buffer.at(0, stride, 0),
                                      &offsets[at], &with[centres.buffer.at(t, y, 0)],
                                      std::min(step, unit.last - unit.first - y), dy_shape.columns,
                                      &sums[task * size + (d * taps + at) * PAIR]);
              });
        }
      }
    };
  });
  for (long tap = 0; tap < taps; ++tap)
    for (long c = 0; c < in.channels; ++c)
      for (long d = 0; d < multiplier; ++d) {
        float sum = 0;
        for (long group = 0; group < groups; ++group)
          sum += sums[(c / PAIR * groups + group) * size + (d * taps + tap) * PAIR + c % PAIR];
        out->typed_data<float>()[(tap * in.channels + c) * multiplier + d] = sum;
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_input_gradient, input_gradient, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_kernel_gradient, kernel_gradient, binding());
