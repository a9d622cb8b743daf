"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const INPUT_TILE = 80, MAP_TILE = 44;  // minimum width of a tile on the screen, in CSS pixels
const GAP = 2;  // pixels between tiles

// Arrays are float16 or float32, little endian, in base64.
function bytes(text) { return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); }
function float16s(text) {
  const raw = new Uint16Array(bytes(text).buffer), out = new Float32Array(raw.length);
  for (let i = 0; i < raw.length; i++) {
    const h = raw[i], exponent = (h >> 10) & 31, fraction = h & 1023;
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    out[i] = h & 0x8000 ? -size : size;
  }
  return out;
}
function float32s(text) { return new Float32Array(bytes(text).buffer); }
function decode(layer) {  // on first use
  if (!layer.arrays) {
    layer.arrays = { q: float16s(layer.q), k: float16s(layer.k), keyKernels: float32s(layer.key_kernels),
      valueKernels: float32s(layer.value_kernels), gram: float32s(layer.gram) };
  }
  return layer.arrays;
}
const product = (sides) => sides.reduce((a, b) => a * b, 1);

// The maps of one query, as structvit_jax.ops.struct_attention_maps computes them, with value kernels averaged over channels.
function explain(layer, head, query) {
  const { q, k, keyKernels, valueKernels } = decode(layer), { grid, key_grid, stride, channels, structure_dim } = layer;
  const positions = product(grid), keys = product(key_grid), scale = channels ** -0.5;
  const row = (array, i) => array.subarray((head * positions + i) * channels, (head * positions + i + 1) * channels);
  const own = row(q, query), correlation = new Float64Array(positions);
  for (let j = 0; j < positions; j++) correlation[j] = scale * dot(own, row(k, j));
  const logits = new Float64Array(structure_dim * keys);
  const taps = product(layer.key_window), wide = layer.key_channels;
  forEachTap(layer, layer.key_window, (m, pairs) => {
    for (let d = 0; d < structure_dim; d++) {
      const kernel = keyKernels.subarray(((head * taps + m) * structure_dim + d) * wide, ((head * taps + m) * structure_dim + d + 1) * wide);
      const weighted = wide === 1 ? null : own.map((value, c) => value * kernel[c]);
      for (let n = 0; n < pairs.length; n += 2) {
        const [j, p] = [pairs[n], pairs[n + 1]];
        logits[d * keys + j] += weighted ? scale * dot(weighted, row(k, p)) : kernel[0] * correlation[p];
      }
    }
  });
  let most = -Infinity, total = 0;
  for (const logit of logits) most = Math.max(most, logit);
  const attention = logits.map((logit) => { const e = Math.exp(logit - most); total += e; return e; });
  attention.forEach((_, i) => { attention[i] /= total; });
  const final = new Float64Array(positions), sides = product(layer.value_window);
  forEachTap(layer, layer.value_window, (m, pairs) => {
    for (let d = 0; d < structure_dim; d++) {
      const weight = valueKernels[(head * sides + m) * structure_dim + d];
      for (let n = 0; n < pairs.length; n += 2) final[pairs[n + 1]] += weight * attention[d * keys + pairs[n]];
    }
  });
  return { correlation, attention, final, rank: rank(layer, head, attention) };
}
function dot(a, b) { let sum = 0; for (let c = 0; c < a.length; c++) sum += a[c] * b[c]; return sum; }
// Call act(m, pairs) for each tap m of a window. pairs holds the key position j at the window's centre and the grid position p under the tap.
function forEachTap(layer, window, act) {
  const [T, H, W] = layer.grid, [t, h, w] = layer.key_grid, s = layer.stride, pairs = new Int32Array(2 * t * h * w);
  let m = 0;
  for (let a = 0; a < window[0]; a++) for (let b = 0; b < window[1]; b++) for (let c = 0; c < window[2]; c++, m++) {
    let n = 0;
    for (let z = 0; z < t; z++) for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
      const [pz, py, px] = [z + a - (window[0] >> 1), y * s + b - (window[1] >> 1), x * s + c - (window[2] >> 1)];
      if (pz < 0 || pz >= T || py < 0 || py >= H || px < 0 || px >= W) continue;
      pairs[n++] = (z * h + y) * w + x; pairs[n++] = (pz * H + py) * W + px;
    }
    act(m, pairs.subarray(0, n));
  }
}
function kappa(layer, head, attention, j) {
  const { valueKernels } = decode(layer), taps = product(layer.value_window), keys = product(layer.key_grid), out = new Float64Array(taps);
  for (let m = 0; m < taps; m++) for (let d = 0; d < layer.structure_dim; d++)
    out[m] += valueKernels[(head * taps + m) * layer.structure_dim + d] * attention[d * keys + j];
  return out;
}
// The exponential of the entropy of the singular values of all dynamic kernels, computed from the Gram matrices of their two factors.
function rank(layer, head, attention) {
  const D = layer.structure_dim, keys = product(layer.key_grid), { gram } = decode(layer);
  const G = Array.from({ length: D }, (_, a) => Array.from(gram.subarray((head * D + a) * D, (head * D + a + 1) * D)));
  const A = Array.from({ length: D }, (_, a) => Array.from({ length: D }, (_, b) => {
    let sum = 0; for (let j = 0; j < keys; j++) sum += attention[a * keys + j] * attention[b * keys + j]; return sum; }));
  const L = cholesky(G), B = multiply(multiply(transpose(L), A), L);
  const values = eigenvalues(B).map((value) => Math.sqrt(Math.max(value, 0)));
  const sum = values.reduce((a, b) => a + b, 0);
  return Math.exp(-values.reduce((a, value) => a + (value > 0 ? value / sum * Math.log(value / sum) : 0), 0));
}
const transpose = (A) => A[0].map((_, i) => A.map((row) => row[i]));
const multiply = (A, B) => A.map((row) => B[0].map((_, j) => row.reduce((sum, value, k) => sum + value * B[k][j], 0)));
function cholesky(A) {
  const n = A.length, L = A.map((row) => row.map(() => 0)), least = 1e-12 * Math.max(...A.map((row, i) => row[i]));
  for (let i = 0; i < n; i++) for (let j = 0; j <= i; j++) {
    let sum = A[i][j]; for (let k = 0; k < j; k++) sum -= L[i][k] * L[j][k];
    if (i === j) L[i][i] = Math.sqrt(Math.max(sum, 0)); else L[i][j] = L[j][j] ** 2 > least ? sum / L[j][j] : 0;
  }
  return L;
}
function eigenvalues(A) {  // by Jacobi rotations
  A = A.map((row) => row.slice());
  for (let sweep = 0; sweep < 30; sweep++) for (let p = 0; p < A.length; p++) for (let q = p + 1; q < A.length; q++) {
    if (!A[p][q]) continue;
    const angle = 0.5 * Math.atan2(2 * A[p][q], A[q][q] - A[p][p]), c = Math.cos(angle), s = Math.sin(angle);
    for (const row of A) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
    const [P, Q] = [A[p], A[q]];
    [A[p], A[q]] = [P.map((value, i) => c * value - s * Q[i]), P.map((value, i) => s * value + c * Q[i])];
  }
  return A.map((row, i) => row[i]);
}

// The selection. The query and `at`, the position of the dynamic kernel (null: the query), are in fractions of the first model's
// input. `time`, the frame of the large canvases, is a fraction of the clip.
const state = { layer: data.layer, head: data.head, query: data.query, at: null, time: data.query[0], smooth: data.smooth };
const frames = [];
let views = [];  // of each model: { crop, layer, head, query, at, maps }
const index = (fraction, n) => Math.min(Math.floor(fraction * n), n - 1);
const flatIndex = (sides, point) => point.reduce((flat, x, axis) => flat * sides[axis] + index(x, sides[axis]), 0);
const centre = (sides, point) => point.map((x, axis) => (index(x, sides[axis]) + 0.5) / sides[axis]);
function layerOf(model) { return model.layers.find((layer) => layer.name === state.layer) || model.layers[model.layers.length - 1]; }
// Points (time, row, column) in fractions of a crop's sides and of the whole frame's. A crop is [top, left, height, width].
const inFrame = ([top, left, height, width], [t, y, x]) => [t, top + y * height, left + x * width];
const inside = (x) => Math.max(0, Math.min(0.9999, x));
const inCrop = ([top, left, height, width], [t, y, x]) => [t, inside((y - top) / height), inside((x - left) / width)];

function update() {
  const crop = data.models[0].crop;
  views = data.models.map((model) => {
    const layer = layerOf(model), head = Math.min(state.head, layer.heads - 1);
    const query = inCrop(model.crop, inFrame(crop, state.query)), at = inCrop(model.crop, inFrame(crop, state.at || state.query));
    return { crop: model.crop, layer, head, query: centre(layer.grid, query), at, maps: explain(layer, head, flatIndex(layer.grid, query)) };
  });
  draw();
  history.replaceState(null, "", `#${new URLSearchParams({ layer: state.layer, head: state.head, query: state.query.map((x) => x.toFixed(4)) })}`);
}
function select(query) { state.query = query; state.at = null; state.time = query[0]; update(); }
function draw() {
  const first = views[0], cell = state.query.map((x, axis) => index(x, first.layer.grid[axis]));
  $("where").textContent = `query at ${data.video ? `time ${cell[0]}, ` : ""}row ${cell[1]}, column ${cell[2]} of ${first.layer.grid.slice(data.video ? 0 : 1).join(" × ")}`;
  $("time").value = index(state.time, frames.length);
  const marks = [[first.query, first.layer.grid, "#d95f02"]];
  for (const canvas of data.video ? [$("large"), $("frames")] : [$("frames")])
    drawTiles(canvas, frames.length, INPUT_TILE, first.crop, marks, drawFrame);
  views.forEach((view, number) => drawModel(document.querySelectorAll("section")[number], view));
}

// Drawing. A canvas has one tile per time, in as many rows as the minimum tile width requires; a large canvas has one tile, of state.time.
function drawTiles(canvas, count, minWidth, crop, marks, paint) {
  const large = canvas.classList.contains("large"), ratio = Math.min(2, window.devicePixelRatio || 1), shown = canvas.clientWidth || 300;
  const times = large ? [state.time] : Array.from({ length: count }, (_, i) => (i + 0.5) / count);
  const rows = Math.ceil(times.length / Math.max(1, Math.floor(shown / minWidth))), columns = Math.ceil(times.length / rows);
  const wide = Math.max(8, Math.floor((shown * ratio + GAP) / columns) - GAP), high = Math.max(1, Math.round(wide * data.size[1] / data.size[0]));
  canvas.tiles = { times, count: times.length, columns, rows, wide, high };
  canvas.width = columns * (wide + GAP) - GAP; canvas.height = rows * (high + GAP) - GAP;
  const context = canvas.getContext("2d");
  times.forEach((time, number) => {
    const left = (number % columns) * (wide + GAP), top = Math.floor(number / columns) * (high + GAP);
    context.save(); context.beginPath(); context.rect(left, top, wide, high); context.clip();
    const [y, x, h, w] = [top + crop[0] * high, left + crop[1] * wide, crop[2] * high, crop[3] * wide];
    paint(context, time, [left, top, wide, high], [x, y, w, h]);
    context.fillStyle = "rgba(0, 0, 0, 0.65)";  // outside the crop that the model saw
    context.beginPath(); context.rect(left, top, wide, high); context.rect(x, y, w, h); context.fill("evenodd");
    for (const [point, grid, style] of marks) if (index(time, grid[0]) === index(point[0], grid[0])) {
      const [cellHigh, cellWide] = [h / grid[1], w / grid[2]], pen = Math.max(1, wide / 160);
      for (const [width, colour] of [[3 * pen, "#fff"], [1.5 * pen, style]]) {
        context.lineWidth = width; context.strokeStyle = colour;
        context.strokeRect(x + point[2] * w - cellWide / 2, y + point[1] * h - cellHigh / 2, cellWide, cellHigh);
      }
    }
    context.restore();
  });
}
function drawFrame(context, time, [left, top, wide, high]) {
  const frame = frames[index(time, frames.length)];
  context.imageSmoothingEnabled = frame.naturalWidth > wide; context.imageSmoothingQuality = "high";
  context.drawImage(frame, left, top, wide, high);
}
function colour(stops, fraction) {
  const at = Math.max(0, Math.min(1, fraction)) * (stops.length - 1), low = Math.floor(at), part = at - low;
  const [a, b] = [stops[low], stops[Math.min(low + 1, stops.length - 1)]];
  return a.map((value, i) => Math.round(value + part * (b[i] - value)));
}
// As structvit_jax.analysis.explain.overlay.Scale: symmetric about zero, or from the lowest to the highest value, after clipping outliers.
function scaleOf(values) {
  const sorted = Float64Array.from(values).sort(), end = (fraction) => {
    const at = fraction * (sorted.length - 1), low = Math.floor(at), high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
  };
  let low = end(data.clipped / 100), high = end(1 - data.clipped / 100);
  const most = Math.max(Math.abs(low), Math.abs(high));
  if (high - low <= 1e-3 * most) low = high = end(0.5);
  else if (low < 0 && high - low >= most / 2) return { low: -most, high: most, signed: true };
  return { low, high, signed: false };
}
const rampOf = (scale) => scale.signed ? "signed" : "sequential";
const onScale = (scale, value) => scale.low === scale.high ? 0.5 : (value - scale.low) / (scale.high - scale.low);
function ends(scale) {  // as text with enough digits to differ
  const wide = Math.max(Math.abs(scale.low), Math.abs(scale.high)) / (scale.high - scale.low || Infinity);
  const digits = 2 + (wide > 0 ? Math.max(0, Math.round(Math.log10(wide))) : 0);
  return [scale.low, scale.high].map((value) => short(value, digits));
}
function drawMap(canvas, values, sides, scale, crop, marks) {
  const [t, h, w] = sides, over = $("over").checked, stops = data.colours[rampOf(scale)][over ? "over" : "plain"];
  const small = document.createElement("canvas"); small.width = w; small.height = h;
  const brush = small.getContext("2d"), picture = brush.createImageData(w, h);
  drawTiles(canvas, t, MAP_TILE, crop, marks, (context, time, tile, box) => {
    const z = index(time, t);
    for (let i = 0; i < h * w; i++) picture.data.set(colour(stops, onScale(scale, values[z * h * w + i])), 4 * i);
    brush.putImageData(picture, 0, 0);
    if (over) { context.filter = "grayscale(1)"; drawFrame(context, time, tile); context.filter = "none"; }
    context.fillStyle = over ? "rgba(200, 200, 200, 0.2)" : "#fff"; context.fillRect(...tile);
    context.imageSmoothingEnabled = state.smooth; context.imageSmoothingQuality = "high";
    context.drawImage(small, ...box);
  });
}
function drawKernel(canvas, values, sides, most) {
  const [t, h, w] = sides, cell = 9; canvas.width = t * (w * cell + 3) - 3; canvas.height = h * cell;
  const context = canvas.getContext("2d");
  for (let z = 0; z < t; z++) for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
    const [red, green, blue] = colour(data.colours.kernel.plain, 0.5 + values[(z * h + y) * w + x] / (2 * (most || 1)));
    context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
    context.fillRect(z * (w * cell + 3) + x * cell, y * cell, cell, cell);
  }
}
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const short = (value, digits = 2) => Number(value.toPrecision(digits)).toString();

function drawModel(section, { crop, layer, head, query, at, maps }) {
  const { keyKernels, valueKernels } = decode(layer), keys = product(layer.key_grid), D = layer.structure_dim;
  section.querySelector(".facts").textContent = `${layer.kind}; ${layer.name}, head ${head} of ${layer.heads}; effective rank of the dynamic kernels ${maps.rank.toFixed(2)} of ${D}`;
  const list = section.querySelector(".maps");
  while (list.children.length > D + 2) list.lastChild.remove();
  while (list.children.length < D + 2) list.append(figure(crop));
  const queryMark = [query, layer.grid, "#d95f02"], keyMark = [centre(layer.key_grid, at), layer.key_grid, "#000"];
  const show = (number, name, description, kernels, values, grid, marks) => {
    const node = list.children[number], scale = scaleOf(values);
    caption(node, name, description, kernels, scale);
    for (const canvas of node.querySelectorAll("canvas.map")) drawMap(canvas, values, grid, scale, crop, marks);
  };
  show(0, "correlation", "with every position", [], maps.correlation, layer.grid, [queryMark]);
  for (let d = 0; d < D; d++) {
    const attention = maps.attention.subarray(d * keys, (d + 1) * keys), sum = attention.reduce((a, b) => a + b, 0);
    const kernels = layer.kind === "self-attention" ? [] : [
      ["key kernel", means(keyKernels, layer, head, d), layer.key_window], ["value kernel", pick(valueKernels, layer, head, d), layer.value_window]];
    show(d + 1, D > 1 ? `structure kernel ${d + 1}` : "attention", `${(100 * sum).toFixed(0)} % of the attention`, kernels, attention, layer.key_grid, state.at ? [queryMark, keyMark] : [queryMark]);
  }
  show(D + 1, "final map", "weight of each value, mean over channels", [], maps.final, layer.grid, [queryMark]);
  drawWindow(section, crop, layer, kappa(layer, head, maps.attention, flatIndex(layer.key_grid, at)), at);
}
function means(keyKernels, layer, head, d) {  // over channels
  const taps = product(layer.key_window), wide = layer.key_channels;
  return Float64Array.from({ length: taps }, (_, m) => { const start = ((head * taps + m) * layer.structure_dim + d) * wide;
    return keyKernels.subarray(start, start + wide).reduce((a, b) => a + b, 0) / wide; });
}
function pick(valueKernels, layer, head, d) {
  const taps = product(layer.value_window); return Float64Array.from({ length: taps }, (_, m) => valueKernels[(head * taps + m) * layer.structure_dim + d]);
}
function figure(crop) {
  const node = document.createElement("figure");
  node.innerHTML = '<figcaption><b></b><span class="scale"></span><span class="bar-of"></span><span class="kernels"></span></figcaption>'
    + '<canvas class="map large" role="img"></canvas>' + (data.video ? '<canvas class="map" role="img"></canvas>' : "");
  for (const canvas of node.querySelectorAll("canvas"))
    canvas.addEventListener("click", (event) => { state.at = inCrop(data.models[0].crop, inFrame(crop, inCrop(crop, pointed(event)))); state.time = state.at[0]; update(); });
  return node;
}
function caption(node, name, description, kernels, scale) {
  const [low, high] = ends(scale), bar = document.createElement("span");
  node.querySelector("b").textContent = name; node.querySelector(".scale").textContent = description;
  const stops = data.colours[rampOf(scale)][$("over").checked ? "over" : "plain"].map(([r, g, b, a]) => `rgba(${r}, ${g}, ${b}, ${a / 255})`);
  bar.className = "ramp"; bar.style.background = `linear-gradient(90deg, ${scale.low === scale.high ? [stops[26], stops[26]] : stops}), #8e8e8e`;
  node.querySelector(".bar-of").replaceChildren(...(scale.low === scale.high ? [low, bar] : [low, bar, high]));
  for (const canvas of node.querySelectorAll("canvas.map")) canvas.setAttribute("aria-label", `${name}: ${description}, ${low} to ${high}`);
  node.querySelector(".kernels").replaceChildren(...kernels.map(([title, values, sides]) => kernelLabel(title, values, sides)));
}
function kernelLabel(title, values, sides) {
  const span = document.createElement("span"), canvas = document.createElement("canvas"), most = largest(values);
  span.className = "kernels"; span.title = `${title}, mean over channels, −${short(most)} to ${short(most)}, over ${sides.join(" × ")}`;
  canvas.className = "kernel"; canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", span.title);
  drawKernel(canvas, values, sides, most); span.append(title, canvas); return span;
}
// The dynamic kernel at one position, beside the pixels in its window.
function drawWindow(section, crop, layer, values, at) {
  const [t, h, w] = layer.value_window, [T, H, W] = layer.grid, point = centre(layer.key_grid, at), tile = 54;
  const canvas = section.querySelector("canvas.seen"), most = largest(values);
  canvas.width = t * (tile + 3) - 3; canvas.height = tile;
  const context = canvas.getContext("2d"), [whole, tall] = [frames[0].naturalWidth, frames[0].naturalHeight];
  const [wide, high, x, y] = [crop[3] * whole, crop[2] * tall, crop[1] * whole, crop[0] * tall];
  context.fillStyle = "#bbb"; context.fillRect(0, 0, canvas.width, tile); context.imageSmoothingEnabled = false;
  for (let z = 0; z < t; z++) {
    const time = index(point[0], T) + z - (t >> 1); if (time < 0 || time >= T) continue;
    const frame = frames[index((time + 0.5) / T, frames.length)], width = w / W * wide, height = h / H * high;
    context.drawImage(frame, x + point[2] * wide - width / 2, y + point[1] * high - height / 2, width, height, z * (tile + 3), 0, tile, tile);
  }
  drawKernel(section.querySelector("canvas.dynamic"), values, layer.value_window, most);
  section.querySelector(".at").textContent = `dynamic kernel ${state.at ? "at the marked position (black)" : "at the query itself"}, mean over channels, −${short(most)} to ${short(most)}; and the pixels in its window`;
}

// Mouse and keyboard. A click is (time, row, column) in fractions of the clip and the frame.
function pointed(event) {
  const canvas = event.currentTarget, box = canvas.getBoundingClientRect(), { times, columns, rows, wide, high } = canvas.tiles;
  const x = (event.clientX - box.left) / box.width * canvas.width, y = (event.clientY - box.top) / box.height * canvas.height;
  const cell = (at, side, most) => Math.max(0, Math.min(most - 1, Math.floor(at / (side + GAP))));
  const column = cell(x, wide, columns), row = cell(y, high, rows), tile = Math.min(times.length - 1, row * columns + column);
  return [times[tile], inside((y - row * (high + GAP)) / high), inside((x - column * (wide + GAP)) / wide)];
}
for (const name of ["large", "frames"]) $(name).addEventListener("click", (event) => select(inCrop(data.models[0].crop, pointed(event))));
$("frames").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [2, -1], ArrowRight: [2, 1], ArrowUp: [1, -1], ArrowDown: [1, 1], PageUp: [0, -1], PageDown: [0, 1] };
  if (!moves[event.key]) return;
  event.preventDefault();
  const [axis, step] = moves[event.key], sides = views[0].layer.grid, next = centre(sides, state.query);
  next[axis] = Math.max(0.5 / sides[axis], Math.min(1 - 0.5 / sides[axis], next[axis] + step / sides[axis]));
  select(next);
});
function fill(select, values, chosen) { select.replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen))); }
function fillHeads() { fill($("head"), Array.from({ length: layerOf(data.models[0]).heads }, (_, i) => String(i)), String(state.head)); }
$("layer").addEventListener("change", (event) => { state.layer = event.target.value; state.head = Math.min(state.head, layerOf(data.models[0]).heads - 1); fillHeads(); update(); });
$("head").addEventListener("change", (event) => { state.head = Number(event.target.value); update(); });
$("over").addEventListener("change", draw);
$("smooth").addEventListener("change", (event) => { state.smooth = event.target.checked; draw(); });
const goTo = (number) => { state.time = (number + 0.5) / frames.length; draw(); };
$("time").addEventListener("input", (event) => goTo(Number(event.target.value)));
let playing = null;
$("play").addEventListener("click", () => {
  if (playing) { clearInterval(playing); playing = null; } else playing = setInterval(() => goTo((index(state.time, frames.length) + 1) % frames.length), Math.max(120, 2500 / frames.length));
  $("play").textContent = playing ? "\u23f8" : "\u25b6"; $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
});

async function start() {
  for (const source of data.frames) { const picture = new Image(); picture.src = source; await picture.decode(); frames.push(picture); }
  $("time").max = frames.length - 1; $("times").hidden = !data.video; $("large").parentNode.hidden = !data.video; $("smooth").checked = state.smooth;
  const linked = new URLSearchParams(location.hash.slice(1)), names = [...new Set(data.models.flatMap((model) => model.layers.map((layer) => layer.name)))];
  if (names.includes(linked.get("layer"))) state.layer = linked.get("layer");
  const point = (linked.get("query") || "").split(",").map(Number);
  if (point.length === 3 && point.every((x) => x >= 0 && x < 1)) { state.query = point; state.time = point[0]; }
  state.head = Math.min(Math.max(0, Number(linked.get("head") || state.head) | 0), layerOf(data.models[0]).heads - 1);
  fill($("layer"), names, state.layer); fillHeads(); update();
  window.addEventListener("resize", draw);
  document.body.dataset.ready = "yes";
}
window.structvit = { state, update, explain, views: () => views, kappa, scaleOf };
start();
