// The page: the selected layer, head and query, and the handlers of mouse, keyboard and controls.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const INPUT_TILE = 80;
const MAP_TILE = 44; // minimum width of a tile on the screen, in CSS pixels
const GAP = 2; // pixels between tiles

// `query` and `at` are points in fractions of the first model's input; the page shows the dynamic kernel at
// `at`, or at the query if `at` is null. `time`, the frame of the large canvases, is a fraction of the clip.
const state = {
  layer: data.layer,
  head: data.head,
  query: data.query,
  at: null,
  time: data.query[0],
  smooth: data.smooth,
};
const frames = [];
let views = []; // one per model: { crop, layer, head, query, at, maps }
const index = (fraction, n) => Math.min(Math.floor(fraction * n), n - 1);
const flatIndex = (sides, point) =>
  point.reduce((flat, x, axis) => flat * sides[axis] + index(x, sides[axis]), 0);
const centre = (sides, point) => point.map((x, axis) => (index(x, sides[axis]) + 0.5) / sides[axis]);

function layerOf(model) {
  return model.layers.find((layer) => layer.name === state.layer) || model.layers[model.layers.length - 1];
}

// Convert points (time, row, column) between fractions of a crop's sides and of the frame's sides. A crop is
// [top, left, height, width], in fractions of the frame's sides.
const inFrame = ([top, left, height, width], [t, y, x]) => [t, top + y * height, left + x * width];
const inside = (x) => Math.max(0, Math.min(0.9999, x));
const inCrop = ([top, left, height, width], [t, y, x]) => [
  t,
  inside((y - top) / height),
  inside((x - left) / width),
];

function update() {
  const crop = data.models[0].crop;
  views = data.models.map((model) => {
    const layer = layerOf(model);
    const head = Math.min(state.head, layer.heads - 1);
    const query = inCrop(model.crop, inFrame(crop, state.query));
    const at = inCrop(model.crop, inFrame(crop, state.at || state.query));
    return {
      crop: model.crop,
      layer,
      head,
      query: centre(layer.grid, query),
      at,
      maps: explain(layer, head, flatIndex(layer.grid, query)),
    };
  });
  draw();
  const query = state.query.map((x) => x.toFixed(4));
  const address = new URLSearchParams({ layer: state.layer, head: state.head, query });
  history.replaceState(null, "", `#${address}`);
}

function select(query) {
  state.query = query;
  state.at = null;
  state.time = query[0];
  update();
}

function draw() {
  const first = views[0];
  const cell = state.query.map((x, axis) => index(x, first.layer.grid[axis]));
  const grid = first.layer.grid.slice(data.video ? 0 : 1).join(" × ");
  const time = data.video ? `time ${cell[0]}, ` : "";
  $("where").textContent = `query at ${time}row ${cell[1]}, column ${cell[2]} of ${grid}`;
  $("time").value = index(state.time, frames.length);
  const marks = [[first.query, first.layer.grid, "#d95f02"]];
  for (const canvas of data.video ? [$("large"), $("frames")] : [$("frames")])
    drawTiles(canvas, frames.length, INPUT_TILE, first.crop, marks, drawFrame);
  views.forEach((view, number) => drawModel(document.querySelectorAll("section")[number], view));
}

// Return the point of a click: (time, row, column) in fractions of the clip and of the frame.
function pointed(event) {
  const canvas = event.currentTarget;
  const box = canvas.getBoundingClientRect();
  const { times, columns, rows, wide, high } = canvas.tiles;
  const x = ((event.clientX - box.left) / box.width) * canvas.width;
  const y = ((event.clientY - box.top) / box.height) * canvas.height;
  const cell = (at, side, most) => Math.max(0, Math.min(most - 1, Math.floor(at / (side + GAP))));
  const column = cell(x, wide, columns);
  const row = cell(y, high, rows);
  const tile = Math.min(times.length - 1, row * columns + column);
  return [times[tile], inside((y - row * (high + GAP)) / high), inside((x - column * (wide + GAP)) / wide)];
}
for (const name of ["large", "frames"])
  $(name).addEventListener("click", (event) => select(inCrop(data.models[0].crop, pointed(event))));
$("frames").addEventListener("keydown", (event) => {
  const moves = {
    ArrowLeft: [2, -1],
    ArrowRight: [2, 1],
    ArrowUp: [1, -1],
    ArrowDown: [1, 1],
    PageUp: [0, -1],
    PageDown: [0, 1],
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  const [axis, step] = moves[event.key];
  const sides = views[0].layer.grid;
  const next = centre(sides, state.query);
  next[axis] = Math.max(0.5 / sides[axis], Math.min(1 - 0.5 / sides[axis], next[axis] + step / sides[axis]));
  select(next);
});

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen)));
}

function fillHeads() {
  fill(
    $("head"),
    Array.from({ length: layerOf(data.models[0]).heads }, (_, i) => String(i)),
    String(state.head),
  );
}
$("layer").addEventListener("change", (event) => {
  state.layer = event.target.value;
  state.head = Math.min(state.head, layerOf(data.models[0]).heads - 1);
  fillHeads();
  update();
});
$("head").addEventListener("change", (event) => {
  state.head = Number(event.target.value);
  update();
});
$("over").addEventListener("change", draw);
$("smooth").addEventListener("change", (event) => {
  state.smooth = event.target.checked;
  draw();
});
const goTo = (number) => {
  state.time = (number + 0.5) / frames.length;
  draw();
};
$("time").addEventListener("input", (event) => goTo(Number(event.target.value)));
let playing = null;
$("play").addEventListener("click", () => {
  if (playing) {
    clearInterval(playing);
    playing = null;
  } else
    playing = setInterval(
      () => goTo((index(state.time, frames.length) + 1) % frames.length),
      Math.max(120, 2500 / frames.length),
    );
  $("play").textContent = playing ? "\u23f8" : "\u25b6";
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
});

async function start() {
  for (const source of data.frames) {
    const picture = new Image();
    picture.src = source;
    await picture.decode();
    frames.push(picture);
  }
  $("time").max = frames.length - 1;
  $("times").hidden = !data.video;
  $("large").parentNode.hidden = !data.video;
  $("smooth").checked = state.smooth;
  const linked = new URLSearchParams(location.hash.slice(1));
  const names = [...new Set(data.models.flatMap((model) => model.layers.map((layer) => layer.name)))];
  if (names.includes(linked.get("layer"))) state.layer = linked.get("layer");
  const point = (linked.get("query") || "").split(",").map(Number);
  if (point.length === 3 && point.every((x) => x >= 0 && x < 1)) {
    state.query = point;
    state.time = point[0];
  }
  state.head = Math.min(
    Math.max(0, Number(linked.get("head") || state.head) | 0),
    layerOf(data.models[0]).heads - 1,
  );
  fill($("layer"), names, state.layer);
  fillHeads();
  update();
  window.addEventListener("resize", draw);
  document.body.dataset.ready = "yes";
}
window.structvit = { state, update, explain, views: () => views, kappa, scaleOf };
start();
