"use strict";

// The maps of one query, computed from the queries, keys and kernels of a layer.

// Arrays are float16 or float32, little endian, in base64.
function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

function float16s(text) {
  const raw = new Uint16Array(bytes(text).buffer);
  const out = new Float32Array(raw.length);
  for (let i = 0; i < raw.length; i++) {
    const h = raw[i];
    const exponent = (h >> 10) & 31;
    const fraction = h & 1023;
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    out[i] = h & 0x8000 ? -size : size;
  }
  return out;
}

function float32s(text) {
  return new Float32Array(bytes(text).buffer);
}

function decode(layer) {
  if (!layer.arrays) {
    // Decode on first use.
    layer.arrays = {
      q: float16s(layer.q),
      k: float16s(layer.k),
      keyKernels: float32s(layer.key_kernels),
      valueKernels: float32s(layer.value_kernels),
      factor: float32s(layer.factor),
    };
  }
  return layer.arrays;
}
const product = (sides) => sides.reduce((a, b) => a * b, 1);

// The same maps as structvit_jax.ops.struct_attention_maps, with value kernels averaged over channels.
function explain(layer, head, query) {
  const { q, k, keyKernels, valueKernels } = decode(layer);
  const { grid, key_grid, stride, channels, structure_dim } = layer;
  const positions = product(grid);
  const keys = product(key_grid);
  const scale = channels ** -0.5;
  const row = (array, i) =>
    array.subarray((head * positions + i) * channels, (head * positions + i + 1) * channels);
  const own = row(q, query);
  const correlation = new Float64Array(positions);
  for (let j = 0; j < positions; j++) correlation[j] = scale * dot(own, row(k, j));
  const logits = new Float64Array(structure_dim * keys);
  const taps = product(layer.key_window);
  const wide = layer.key_channels;
  forEachTap(layer, layer.key_window, (m, pairs) => {
    for (let d = 0; d < structure_dim; d++) {
      const kernel = keyKernels.subarray(
        ((head * taps + m) * structure_dim + d) * wide,
        ((head * taps + m) * structure_dim + d + 1) * wide,
      );
      const weighted = wide === 1 ? null : own.map((value, c) => value * kernel[c]);
      for (let n = 0; n < pairs.length; n += 2) {
        const [j, p] = [pairs[n], pairs[n + 1]];
        logits[d * keys + j] += weighted ? scale * dot(weighted, row(k, p)) : kernel[0] * correlation[p];
      }
    }
  });
  let most = -Infinity;
  let total = 0;
  for (const logit of logits) most = Math.max(most, logit);
  const attention = logits.map((logit) => {
    const e = Math.exp(logit - most);
    total += e;
    return e;
  });
  attention.forEach((_, i) => {
    attention[i] /= total;
  });
  const final = new Float64Array(positions);
  const sides = product(layer.value_window);
  forEachTap(layer, layer.value_window, (m, pairs) => {
    for (let d = 0; d < structure_dim; d++) {
      const weight = valueKernels[(head * sides + m) * structure_dim + d];
      for (let n = 0; n < pairs.length; n += 2)
        final[pairs[n + 1]] += weight * attention[d * keys + pairs[n]];
    }
  });
  return { correlation, attention, final, rank: rank(layer, head, attention) };
}

function dot(a, b) {
  let sum = 0;
  for (let c = 0; c < a.length; c++) sum += a[c] * b[c];
  return sum;
}

// Call act(m, pairs) for each tap m of a window. `pairs` is a flat list of pairs: the key position at the
// centre of the window, and the grid position under the tap.
function forEachTap(layer, window, act) {
  const [T, H, W] = layer.grid;
  const [t, h, w] = layer.key_grid;
  const s = layer.stride;
  const pairs = new Int32Array(2 * t * h * w);
  let m = 0;
  for (let a = 0; a < window[0]; a++)
    for (let b = 0; b < window[1]; b++)
      for (let c = 0; c < window[2]; c++, m++) {
        let n = 0;
        for (let z = 0; z < t; z++)
          for (let y = 0; y < h; y++)
            for (let x = 0; x < w; x++) {
              const [pz, py, px] = [
                z + a - (window[0] >> 1),
                y * s + b - (window[1] >> 1),
                x * s + c - (window[2] >> 1),
              ];
              if (pz < 0 || pz >= T || py < 0 || py >= H || px < 0 || px >= W) continue;
              pairs[n++] = (z * h + y) * w + x;
              pairs[n++] = (pz * H + py) * W + px;
            }
        act(m, pairs.subarray(0, n));
      }
}

// The dynamic kernel at key position j, averaged over channels.
function kappa(layer, head, attention, j) {
  const { valueKernels } = decode(layer);
  const taps = product(layer.value_window);
  const keys = product(layer.key_grid);
  const out = new Float64Array(taps);
  for (let m = 0; m < taps; m++)
    for (let d = 0; d < layer.structure_dim; d++)
      out[m] += valueKernels[(head * taps + m) * layer.structure_dim + d] * attention[d * keys + j];
  return out;
}

// The effective rank: the exponential of the entropy of the singular values of the dynamic kernels V A, where
// V are the value kernels and A is the attention. With V = Q F and orthonormal Q, the squares of the singular
// values are the eigenvalues of F A A' F', where A A' is the Gram matrix of the attention.
function rank(layer, head, attention) {
  const D = layer.structure_dim;
  const keys = product(layer.key_grid);
  const { factor } = decode(layer);
  const rows = factor.length / layer.heads / D;
  const F = Array.from({ length: rows }, (_, a) =>
    Array.from(factor.subarray((head * rows + a) * D, (head * rows + a + 1) * D)),
  );
  const gram = Array.from({ length: D }, (_, a) =>
    Array.from({ length: D }, (_, b) => {
      let sum = 0;
      for (let j = 0; j < keys; j++) sum += attention[a * keys + j] * attention[b * keys + j];
      return sum;
    }),
  );
  const values = eigenvalues(multiply(multiply(F, gram), transpose(F))).map((value) =>
    Math.sqrt(Math.max(value, 0)),
  );
  const sum = values.reduce((a, b) => a + b, 0);
  return Math.exp(
    -values.reduce((a, value) => a + (value > 0 ? (value / sum) * Math.log(value / sum) : 0), 0),
  );
}
const transpose = (A) => A[0].map((_, i) => A.map((row) => row[i]));
const multiply = (A, B) =>
  A.map((row) => B[0].map((_, j) => row.reduce((sum, value, k) => sum + value * B[k][j], 0)));

function eigenvalues(A) {
  // Jacobi rotations of a symmetric matrix.
  A = A.map((row) => row.slice());
  for (let sweep = 0; sweep < 30; sweep++)
    for (let p = 0; p < A.length; p++)
      for (let q = p + 1; q < A.length; q++) {
        if (!A[p][q]) continue;
        const angle = 0.5 * Math.atan2(2 * A[p][q], A[q][q] - A[p][p]);
        const c = Math.cos(angle);
        const s = Math.sin(angle);
        for (const row of A) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
        const [P, Q] = [A[p], A[q]];
        [A[p], A[q]] = [P.map((value, i) => c * value - s * Q[i]), P.map((value, i) => s * value + c * Q[i])];
      }
  return A.map((row, i) => row[i]);
}
