// Pixel operations of structvit_jax.data.pixels on all frames of a clip. Results are stored without gaps.
//
// They give the same bits as Pillow: the same formulas in the same order, without fused multiply-adds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

using u8 = std::uint8_t;

struct Clip {  // uint8 [frames, height, width, 3]
  const u8* pixels;
  long frame_bytes, row_bytes;  // from one frame or row to the next
  int frames, height, width;

  const u8* row(int frame, int y) const { return pixels + frame * frame_bytes + y * row_bytes; }
};

struct Box {  // pixels of a frame
  int top, left, height, width;
};

using Int4 = std::int32_t __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));

inline double as_double(std::int32_t value) { return value; }
inline double as_double(double value) { return value; }
#if defined(__AVX__)  // GCC 12 splits these conversions
inline Double4 as_double(Int4 values) { return (Double4)_mm256_cvtepi32_pd((__m128i)values); }
inline Int4 truncated(Double4 values) { return (Int4)_mm256_cvttpd_epi32((__m256d)values); }
#else
inline Double4 as_double(Int4 values) { return __builtin_convertvector(values, Double4); }
inline Int4 truncated(Double4 values) { return __builtin_convertvector(values, Int4); }
#endif
inline Double4 as_double(Double4 values) { return values; }

// Pillow's bicubic interpolation between v2 and v3. Integers are exact in either type, and faster as integers.
template <typename T>
inline auto cubic(T v1, T v2, T v3, T v4, double d) {
  const T p2 = v3 - v1;
  const T p3 = (v1 - v2) + (v1 - v2) + v3 - v4;
  const T p4 = v2 - v1 - v3 + v4;
  return as_double(v2) + d * (as_double(p2) + d * (as_double(p3) + d * as_double(p4)));
}

inline u8 whole(double value) { return u8(std::clamp(int(value), 0, 255)); }

// Interpolate `count` values between v2 = in[i] and v3 = in[i + step].
void cubic_run(const std::int32_t* in, std::ptrdiff_t step, const double* d, int count, u8* out) {
  for (int i = 0; i < count; ++i) out[i] = whole(cubic(in[i - step], in[i], in[i + step], in[i + 2 * step], d[i]));
}

// A pixel and the first value of the next one, which is not used.
inline Int4 load(const std::int32_t* pixel) {
  Int4 values;
  std::memcpy(&values, pixel, sizeof values);
  return values;
}

// Store the first three values, rounded down and limited to 0 to 255.
inline void store(Double4 values, u8* out) {
  Int4 pixel = truncated(values);
  pixel = pixel < 0 ? Int4{} : pixel;
  pixel = pixel > 255 ? Int4{} + 255 : pixel;
  for (int c = 0; c < 3; ++c) out[c] = u8(pixel[c]);
}

inline Double4 cubic_row(const std::int32_t* p, double d) {
  return cubic(load(p), load(p + 3), load(p + 6), load(p + 9), d);
}

inline u8 clip(float value) { return value <= 0 ? 0 : value >= 255 ? 255 : u8(value); }

// Pillow's ImagingBlend: a + factor * (b - a).
inline u8 blend(int a, int b, float factor) { return clip(float(a) + factor * float(b - a)); }

// Luma as in Pillow's conversion to mode "L".
inline int luma(int red, int green, int blue) { return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16; }

// Weights of the pixels that a bicubic filter with antialiasing averages, for each pixel of a resized line.
struct Filter {
  std::vector<int> first, count;      // the pixels of the line
  std::vector<std::int32_t> weights;  // `width` for each pixel of the result, with `kBits` fractional bits
  int width;
};

constexpr int kBits = 22;

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

Filter make_filter(int from, int to) {
  const double scale = double(from) / to, wide = std::max(scale, 1.0), support = 2 * wide;
  Filter filter{std::vector<int>(to), std::vector<int>(to), {}, int(std::ceil(support)) * 2 + 1};
  filter.weights.resize(std::size_t(to) * filter.width);
  std::vector<double> values(filter.width);
  for (int i = 0; i < to; ++i) {
    const double centre = (i + 0.5) * scale;
    const int first = std::max(int(centre - support + 0.5), 0);
    const int count = std::min(int(centre + support + 0.5), from) - first;
    double sum = 0;
    for (int j = 0; j < count; ++j) sum += values[j] = bicubic((j + first - centre + 0.5) * (1 / wide));
    for (int j = 0; j < count; ++j) {
      const double weight = (sum != 0 ? values[j] / sum : values[j]) * (1 << kBits);
      filter.weights[std::size_t(i) * filter.width + j] = int(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    filter.first[i] = first;
    filter.count[i] = count;
  }
  return filter;
}

}  // namespace

extern "C" {

// Resize one frame bicubically with antialiasing: first the rows, then the columns.
void resample(Clip clip, u8* out, int out_height, int out_width) {
  const int height = clip.height, width = clip.width;
  const int count = 3 * out_width;
  std::vector<u8> rows(std::size_t(height) * count);
  std::vector<std::int32_t> sums(count + 1);  // a pixel is stored as four values
  const auto round = [&](u8* to) {
    for (int i = 0; i < count; ++i) to[i] = u8(std::clamp(sums[i] >> kBits, 0, 255));
  };
  constexpr std::int32_t half = 1 << (kBits - 1);
  if (width == out_width) {
    for (int y = 0; y < height; ++y) std::memcpy(rows.data() + std::size_t(y) * count, clip.row(0, y), count);
  } else {
    const Filter filter = make_filter(width, out_width);
    // Longer than the row, because each sum has the same number of terms, and a pixel is loaded as four values.
    std::vector<std::int32_t> line(3 * (width + filter.width) + 1);
    const int terms = *std::max_element(filter.count.begin(), filter.count.end());
    for (int y = 0; y < height; ++y) {
      std::copy(clip.row(0, y), clip.row(0, y) + 3 * width, line.begin());
      for (int x = 0; x < out_width; ++x) {
        const std::int32_t* p = line.data() + 3 * filter.first[x];
        const std::int32_t* weights = filter.weights.data() + std::size_t(x) * filter.width;
        Int4 sum = Int4{} + half;
        for (int j = 0; j < terms; ++j) {
          Int4 pixel;
          std::memcpy(&pixel, p + 3 * j, sizeof pixel);
          sum += pixel * weights[j];
        }
        std::memcpy(sums.data() + 3 * x, &sum, sizeof sum);
      }
      round(rows.data() + std::size_t(y) * count);
    }
  }
  if (height == out_height) {
    std::copy(rows.begin(), rows.end(), out);
    return;
  }
  const Filter filter = make_filter(height, out_height);
  for (int y = 0; y < out_height; ++y, out += count) {
    std::fill(sums.begin(), sums.end(), half);
    for (int j = 0; j < filter.count[y]; ++j) {
      const std::int32_t weight = filter.weights[std::size_t(y) * filter.width + j];
      const u8* row = rows.data() + std::size_t(filter.first[y] + j) * count;
      for (int i = 0; i < count; ++i) sums[i] += row[i] * weight;
    }
    round(out);
  }
}

// counts[frame][channel][value]
void histograms(Clip clip, std::int32_t* counts) {
  for (int t = 0; t < clip.frames; ++t) {
    std::int32_t part[4][3][256] = {};  // four, because adding to the same count several times in a row is slow
    for (int y = 0; y < clip.height; ++y) {
      const u8* p = clip.row(t, y);
      for (int x = 0; x < clip.width; ++x, p += 3)
        for (int c = 0; c < 3; ++c) ++part[x & 3][c][p[c]];
    }
    for (int c = 0; c < 3; ++c)
      for (int v = 0; v < 256; ++v) *counts++ = part[0][c][v] + part[1][c][v] + part[2][c][v] + part[3][c][v];
  }
}

// sums[frame]: sum of the lumas of all pixels after a look-up in tables[frame][channel][value].
void luma_sums(Clip clip, const u8* tables, std::int64_t* sums) {
  for (int t = 0; t < clip.frames; ++t, tables += 3 * 256) {
    std::int32_t weighted[3][256];
    for (int v = 0; v < 256; ++v) {
      weighted[0][v] = tables[v] * 19595 + 0x8000;
      weighted[1][v] = tables[256 + v] * 38470;
      weighted[2][v] = tables[512 + v] * 7471;
    }
    sums[t] = 0;
    for (int y = 0; y < clip.height; ++y) {
      const u8* p = clip.row(t, y);
      std::int32_t row = 0;
      for (int x = 0; x < clip.width; ++x, p += 3)
        row += (weighted[0][p[0]] + weighted[1][p[1]] + weighted[2][p[2]]) >> 16;
      sums[t] += row;
    }
  }
}

// Replace values by tables[frame][channel][value].
void look_up(Clip clip, const u8* tables, u8* out) {
  for (int t = 0; t < clip.frames; ++t, tables += 3 * 256)
    for (int y = 0; y < clip.height; ++y) {
      const u8* p = clip.row(t, y);
      for (int x = 0; x < clip.width; ++x, p += 3, out += 3) {
        out[0] = tables[p[0]];
        out[1] = tables[256 + p[1]];
        out[2] = tables[512 + p[2]];
      }
    }
}

// Blend with the luma.
void saturate(Clip clip, float factor, u8* out) {
  for (int t = 0; t < clip.frames; ++t)
    for (int y = 0; y < clip.height; ++y) {
      const u8* p = clip.row(t, y);
      for (int x = 0; x < clip.width; ++x, p += 3, out += 3) {
        const int grey = luma(p[0], p[1], p[2]);
        for (int c = 0; c < 3; ++c) out[c] = blend(grey, p[c], factor);
      }
    }
}

// Blend with a 3x3 mean that counts the centre five times. Pixels at the edges stay as they are.
void sharpen(Clip clip, float factor, u8* out) {
  const int count = 3 * clip.width;
  std::vector<std::uint16_t> sums(count);  // of three rows
  for (int t = 0; t < clip.frames; ++t)
    for (int y = 0; y < clip.height; ++y, out += count) {
      const u8* p = clip.row(t, y);
      std::memcpy(out, p, count);
      if (y == 0 || y == clip.height - 1) continue;
      for (int i = 0; i < count; ++i) sums[i] = p[i - clip.row_bytes] + p[i] + p[i + clip.row_bytes];
      for (int i = 3; i < count - 3; ++i) {
        const unsigned sum = sums[i - 3] + sums[i] + sums[i + 3] + 4u * p[i];
        out[i] = blend((2 * sum + 13) / 26, p[i], factor);  // the mean is rounded; 13 is odd, so there are no ties
      }
    }
}

// Show at each point (x, y) of a frame the point (m0 x + m1 y + m2, m3 x + m4 y + m5), interpolated bicubically, or
// `fill` if that is outside the frame of frame_height x frame_width. `clip` holds the box of the frames whose corner is
// (top, left), and `out` takes the box `target` of the results.
void warp(Clip clip, int top, int left, int frame_height, int frame_width, const double* m, const u8* fill, Box target,
          u8* out) {
  // Where the points of each row come from: the range that is inside the frame, the pixel left and above of each point,
  // and the distances from there to the point; for runs also the distance for each channel.
  const bool rows_stay = m[3] == 0 && m[4] == 1 && m[5] == 0, columns_stay = m[0] == 1 && m[1] == 0 && m[2] == 0;
  const bool in_runs = rows_stay || (columns_stay && m[3] == 0);  // long runs of points with adjacent pixels
  const std::ptrdiff_t columns = 3 * (clip.width + 4);
  const std::size_t points = std::size_t(target.height) * target.width;
  thread_local std::vector<int> begins, ends, offsets;
  thread_local std::vector<double> across, down, runs;
  begins.resize(target.height);
  ends.resize(target.height);
  offsets.resize(points);
  across.resize(points);
  down.resize(points);
  if (in_runs) runs.resize(3 * points);
  for (int row = 0; row < target.height; ++row) {
    const double y = target.top + row + 0.5;
    double* x_in = across.data() + std::size_t(row) * target.width;
    double* y_in = down.data() + std::size_t(row) * target.width;
    int* offset = offsets.data() + std::size_t(row) * target.width;
    for (int i = 0; i < target.width; ++i) {
      const double x = target.left + i + 0.5;
      x_in[i] = m[0] * x + m[1] * y + m[2];
      y_in[i] = m[3] * x + m[4] * y + m[5];
    }
    const auto inside = [&](int i) {
      return x_in[i] >= 0 && x_in[i] < frame_width && y_in[i] >= 0 && y_in[i] < frame_height;
    };
    int begin = 0, end = target.width;
    while (begin < end && !inside(begin)) ++begin;
    while (end > begin && !inside(end - 1)) --end;
    begins[row] = begin;
    ends[row] = end;
    for (int i = 0; i < target.width; ++i) {
      const double first_x = std::floor(x_in[i] - 0.5), first_y = std::floor(y_in[i] - 0.5);
      offset[i] = int(first_y) * int(columns) + 3 * int(first_x);
      x_in[i] = (x_in[i] - 0.5) - first_x;
      y_in[i] = (y_in[i] - 0.5) - first_y;
    }
    if (!in_runs) continue;
    const double* distances = rows_stay ? x_in : y_in;
    double* run = runs.data() + 3 * std::size_t(row) * target.width;
    for (int i = 0; i < target.width; ++i)
      for (int c = 0; c < 3; ++c) run[3 * i + c] = distances[i];
  }

  thread_local std::vector<std::int32_t> pixels;
  pixels.resize((clip.height + 4) * columns + 1);  // `load` reads a value more than a pixel has
  const std::int32_t* origin = pixels.data() + (2 - top) * columns + 3 * (2 - left);  // pixel (0, 0)
  for (int t = 0; t < clip.frames; ++t) {
    // Copy the frame as integers with a border of two pixels, which repeats the edge.
    for (int y = 0; y < clip.height + 4; ++y) {
      const u8* row = clip.row(t, std::clamp(y - 2, 0, clip.height - 1));
      std::int32_t* to = pixels.data() + y * columns;
      std::copy(row, row + 3 * clip.width, to + 6);
      for (int i = 0; i < 6; ++i) {
        to[i] = row[i % 3];
        to[6 + 3 * clip.width + i] = row[3 * (clip.width - 1) + i % 3];
      }
    }
    for (int row = 0; row < target.height; ++row, out += 3 * target.width) {
      const std::size_t start = std::size_t(row) * target.width;
      const int begin = begins[row], end = ends[row], *offset = offsets.data() + start;
      for (int i = 0; i < begin; ++i) std::memcpy(out + 3 * i, fill, 3);
      for (int i = end; i < target.width; ++i) std::memcpy(out + 3 * i, fill, 3);
      if (in_runs) {
        for (int i = begin, next; i < end; i = next) {
          for (next = i + 1; next < end && offset[next] - offset[i] == 3 * (next - i);) ++next;
          const double* distances = runs.data() + 3 * (start + i);
          cubic_run(origin + offset[i], rows_stay ? 3 : columns, distances, 3 * (next - i), out + 3 * i);
        }
        continue;
      }
      const double *dx = across.data() + start, *dy = down.data() + start;
      for (int i = begin; i < end; ++i) {
        const std::int32_t* p = origin + offset[i] - columns;
        const auto interpolate = [&](auto line) {
          return cubic(line(p), line(p + columns), line(p + 2 * columns), line(p + 3 * columns), dy[i]);
        };
        if (columns_stay)
          store(interpolate(load), out + 3 * i);
        else
          store(interpolate([&](const std::int32_t* q) { return cubic_row(q - 3, dx[i]); }), out + 3 * i);
      }
    }
  }
}

}  // extern "C"
