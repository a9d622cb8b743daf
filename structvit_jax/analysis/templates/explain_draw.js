// Drawing: frames, maps over frames, kernels and captions.

// A canvas has one tile per time position, in as many rows as the minimum tile width requires. A large canvas
// has a single tile, which shows state.time.
function drawTiles(canvas, count, minWidth, crop, marks, paint) {
  const large = canvas.classList.contains("large");
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  const shown = canvas.clientWidth || 300;
  const times = large ? [state.time] : Array.from({ length: count }, (_, i) => (i + 0.5) / count);
  const rows = Math.ceil(times.length / Math.max(1, Math.floor(shown / minWidth)));
  const columns = Math.ceil(times.length / rows);
  const wide = Math.max(8, Math.floor((shown * ratio + GAP) / columns) - GAP);
  const high = Math.max(1, Math.round((wide * data.size[1]) / data.size[0]));
  canvas.tiles = { times, count: times.length, columns, rows, wide, high };
  canvas.width = columns * (wide + GAP) - GAP;
  canvas.height = rows * (high + GAP) - GAP;
  const context = canvas.getContext("2d");
  times.forEach((time, number) => {
    const left = (number % columns) * (wide + GAP);
    const top = Math.floor(number / columns) * (high + GAP);
    context.save();
    context.beginPath();
    context.rect(left, top, wide, high);
    context.clip();
    const [y, x, h, w] = [top + crop[0] * high, left + crop[1] * wide, crop[2] * high, crop[3] * wide];
    paint(context, time, [left, top, wide, high], [x, y, w, h]);
    context.fillStyle = "rgba(0, 0, 0, 0.65)"; // outside the crop that the model saw
    context.beginPath();
    context.rect(left, top, wide, high);
    context.rect(x, y, w, h);
    context.fill("evenodd");
    for (const [point, grid, style] of marks)
      if (index(time, grid[0]) === index(point[0], grid[0])) {
        const [cellHigh, cellWide] = [h / grid[1], w / grid[2]];
        const pen = Math.max(1, wide / 160);
        for (const [width, colour] of [
          [3 * pen, "#fff"],
          [1.5 * pen, style],
        ]) {
          context.lineWidth = width;
          context.strokeStyle = colour;
          context.strokeRect(
            x + point[2] * w - cellWide / 2,
            y + point[1] * h - cellHigh / 2,
            cellWide,
            cellHigh,
          );
        }
      }
    context.restore();
  });
}

function drawFrame(context, time, [left, top, wide, high]) {
  const frame = frames[index(time, frames.length)];
  context.imageSmoothingEnabled = frame.naturalWidth > wide;
  context.imageSmoothingQuality = "high";
  context.drawImage(frame, left, top, wide, high);
}

function colour(stops, fraction) {
  const at = Math.max(0, Math.min(1, fraction)) * (stops.length - 1);
  const low = Math.floor(at);
  const part = at - low;
  const [a, b] = [stops[low], stops[Math.min(low + 1, stops.length - 1)]];
  return a.map((value, i) => Math.round(value + part * (b[i] - value)));
}

// The same scale as structvit_jax.analysis.explain.overlay.Scale: after clipping outliers, it is symmetric
// about zero, or it runs from the lowest to the highest value.
function scaleOf(values) {
  const sorted = Float64Array.from(values).sort();
  const end = (fraction) => {
    const at = fraction * (sorted.length - 1),
      low = Math.floor(at),
      high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
  };
  let low = end(data.clipped / 100);
  let high = end(1 - data.clipped / 100);
  const most = Math.max(Math.abs(low), Math.abs(high));
  if (high - low <= 1e-3 * most) low = high = end(0.5);
  else if (low < 0 && high - low >= most / 2) return { low: -most, high: most, signed: true };
  return { low, high, signed: false };
}
const rampOf = (scale) => (scale.signed ? "signed" : "sequential");
const onScale = (scale, value) =>
  scale.low === scale.high ? 0.5 : (value - scale.low) / (scale.high - scale.low);

function ends(scale) {
  // The labels of both ends, with enough digits to differ.
  const wide = Math.max(Math.abs(scale.low), Math.abs(scale.high)) / (scale.high - scale.low || Infinity);
  const digits = 2 + (wide > 0 ? Math.max(0, Math.round(Math.log10(wide))) : 0);
  return [scale.low, scale.high].map((value) => short(value, digits));
}

function drawMap(canvas, values, sides, scale, crop, marks) {
  const [t, h, w] = sides;
  const over = $("over").checked;
  const stops = data.colours[rampOf(scale)][over ? "over" : "plain"];
  const small = document.createElement("canvas");
  small.width = w;
  small.height = h;
  const brush = small.getContext("2d");
  const picture = brush.createImageData(w, h);
  drawTiles(canvas, t, MAP_TILE, crop, marks, (context, time, tile, box) => {
    const z = index(time, t);
    for (let i = 0; i < h * w; i++)
      picture.data.set(colour(stops, onScale(scale, values[z * h * w + i])), 4 * i);
    brush.putImageData(picture, 0, 0);
    if (over) {
      context.filter = "grayscale(1)";
      drawFrame(context, time, tile);
      context.filter = "none";
    }
    context.fillStyle = over ? "rgba(200, 200, 200, 0.2)" : "#fff";
    context.fillRect(...tile);
    context.imageSmoothingEnabled = state.smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, ...box);
  });
}

function drawKernel(canvas, values, sides, most) {
  const [t, h, w] = sides;
  const cell = 9;
  canvas.width = t * (w * cell + 3) - 3;
  canvas.height = h * cell;
  const context = canvas.getContext("2d");
  for (let z = 0; z < t; z++)
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++) {
        const [red, green, blue] = colour(
          data.colours.kernel.plain,
          0.5 + values[(z * h + y) * w + x] / (2 * (most || 1)),
        );
        context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
        context.fillRect(z * (w * cell + 3) + x * cell, y * cell, cell, cell);
      }
}
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const short = (value, digits = 2) => Number(value.toPrecision(digits)).toString();

function drawModel(section, { crop, layer, head, query, at, maps }) {
  const { keyKernels, valueKernels } = decode(layer);
  const keys = product(layer.key_grid);
  const D = layer.structure_dim;
  section.querySelector(".facts").textContent =
    `${layer.kind}; ${layer.name}, head ${head} of ${layer.heads};` +
    ` effective rank of the dynamic kernels ${maps.rank.toFixed(2)} of ${D}`;
  const list = section.querySelector(".maps");
  while (list.children.length > D + 2) list.lastChild.remove();
  while (list.children.length < D + 2) list.append(figure(crop));
  const queryMark = [query, layer.grid, "#d95f02"];
  const keyMark = [centre(layer.key_grid, at), layer.key_grid, "#000"];
  const show = (number, name, description, kernels, values, grid, marks) => {
    const node = list.children[number],
      scale = scaleOf(values);
    caption(node, name, description, kernels, scale);
    for (const canvas of node.querySelectorAll("canvas.map"))
      drawMap(canvas, values, grid, scale, crop, marks);
  };
  show(0, "correlation", "with every position", [], maps.correlation, layer.grid, [queryMark]);
  for (let d = 0; d < D; d++) {
    const attention = maps.attention.subarray(d * keys, (d + 1) * keys);
    const sum = attention.reduce((a, b) => a + b, 0);
    const kernels =
      layer.kind === "self-attention"
        ? []
        : [
            ["key kernel", keyKernel(keyKernels, layer, head, d), layer.key_window],
            ["value kernel", valueKernel(valueKernels, layer, head, d), layer.value_window],
          ];
    show(
      d + 1,
      D > 1 ? `structure kernel ${d + 1}` : "attention",
      `${(100 * sum).toFixed(0)} % of the attention`,
      kernels,
      attention,
      layer.key_grid,
      state.at ? [queryMark, keyMark] : [queryMark],
    );
  }
  show(D + 1, "final map", "weight of each value, mean over channels", [], maps.final, layer.grid, [
    queryMark,
  ]);
  drawWindow(section, crop, layer, kappa(layer, head, maps.attention, flatIndex(layer.key_grid, at)), at);
}

// Structure kernel d of the keys, averaged over channels.
function keyKernel(keyKernels, layer, head, d) {
  const taps = product(layer.key_window);
  const wide = layer.key_channels;
  return Float64Array.from({ length: taps }, (_, m) => {
    const start = ((head * taps + m) * layer.structure_dim + d) * wide;
    return keyKernels.subarray(start, start + wide).reduce((a, b) => a + b, 0) / wide;
  });
}

// Structure kernel d of the values; the page has only its mean over channels.
function valueKernel(valueKernels, layer, head, d) {
  const taps = product(layer.value_window);
  return Float64Array.from(
    { length: taps },
    (_, m) => valueKernels[(head * taps + m) * layer.structure_dim + d],
  );
}

function figure(crop) {
  const node = document.createElement("figure");
  node.innerHTML =
    '<figcaption><b></b><span class="scale"></span><span class="bar-of"></span><span class="kernels"></span></figcaption>' +
    '<canvas class="map large" role="img"></canvas>' +
    (data.video ? '<canvas class="map" role="img"></canvas>' : "");
  for (const canvas of node.querySelectorAll("canvas"))
    canvas.addEventListener("click", (event) => {
      state.at = inCrop(data.models[0].crop, inFrame(crop, inCrop(crop, pointed(event))));
      state.time = state.at[0];
      update();
    });
  return node;
}

function caption(node, name, description, kernels, scale) {
  const [low, high] = ends(scale);
  const bar = document.createElement("span");
  node.querySelector("b").textContent = name;
  node.querySelector(".scale").textContent = description;
  const stops = data.colours[rampOf(scale)][$("over").checked ? "over" : "plain"].map(
    ([r, g, b, a]) => `rgba(${r}, ${g}, ${b}, ${a / 255})`,
  );
  bar.className = "ramp";
  const ramp = scale.low === scale.high ? [stops[26], stops[26]] : stops;
  bar.style.background = `linear-gradient(90deg, ${ramp}), #8e8e8e`;
  node
    .querySelector(".bar-of")
    .replaceChildren(...(scale.low === scale.high ? [low, bar] : [low, bar, high]));
  for (const canvas of node.querySelectorAll("canvas.map"))
    canvas.setAttribute("aria-label", `${name}: ${description}, ${low} to ${high}`);
  node
    .querySelector(".kernels")
    .replaceChildren(...kernels.map(([title, values, sides]) => kernelLabel(title, values, sides)));
}

function kernelLabel(title, values, sides) {
  const span = document.createElement("span");
  const canvas = document.createElement("canvas");
  const most = largest(values);
  span.className = "kernels";
  span.title = `${title}, mean over channels, −${short(most)} to ${short(most)}, over ${sides.join(" × ")}`;
  canvas.className = "kernel";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", span.title);
  drawKernel(canvas, values, sides, most);
  span.append(title, canvas);
  return span;
}

// The dynamic kernel at one position, beside the pixels in its window.
function drawWindow(section, crop, layer, values, at) {
  const [t, h, w] = layer.value_window;
  const [T, H, W] = layer.grid;
  const strides = [1, layer.stride, layer.stride];
  const point = at.map(
    (x, axis) => (index(x, layer.key_grid[axis]) * strides[axis] + 0.5) / layer.grid[axis],
  ); // the centre of the window
  const tile = 54;
  const canvas = section.querySelector("canvas.seen");
  const most = largest(values);
  canvas.width = t * (tile + 3) - 3;
  canvas.height = tile;
  const context = canvas.getContext("2d");
  const [whole, tall] = [frames[0].naturalWidth, frames[0].naturalHeight];
  const [wide, high, x, y] = [crop[3] * whole, crop[2] * tall, crop[1] * whole, crop[0] * tall];
  context.fillStyle = "#bbb";
  context.fillRect(0, 0, canvas.width, tile);
  context.imageSmoothingEnabled = false;
  for (let z = 0; z < t; z++) {
    const time = index(point[0], T) + z - (t >> 1);
    if (time < 0 || time >= T) continue;
    const frame = frames[index((time + 0.5) / T, frames.length)];
    const width = (w / W) * wide;
    const height = (h / H) * high;
    context.drawImage(
      frame,
      x + point[2] * wide - width / 2,
      y + point[1] * high - height / 2,
      width,
      height,
      z * (tile + 3),
      0,
      tile,
      tile,
    );
  }
  drawKernel(section.querySelector("canvas.dynamic"), values, layer.value_window, most);
  const where = state.at ? "at the marked position (black)" : "at the query itself";
  section.querySelector(".at").textContent =
    `dynamic kernel ${where}, mean over channels, from −${short(most)} to ${short(most)},` +
    " and the pixels in its window";
}
