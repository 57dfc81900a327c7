"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Charts.

const scale = () => document.querySelector("input[name=scale]:checked").value;

function draw(place) {
  const found = data.charts[place.dataset.chart];
  const specification = found.linear ? found[scale()] : found;
  return vegaEmbed(place, specification, { renderer: "svg", actions: false });
}

const places = [...document.querySelectorAll(".chart")];
Promise.all(places.map(draw)).then(() => { document.documentElement.dataset.drawn = "all"; });
for (const choice of document.querySelectorAll("input[name=scale]"))
  choice.addEventListener("change", () => places.filter((place) => data.charts[place.dataset.chart].linear).forEach(draw));

// Images: what is left of each at the place of the slider.

const slider = document.getElementById("place");
const canvases = [...document.querySelectorAll("canvas[data-image]")];
const colour = (keeper, alpha) => `hsl(${(keeper * 222.492236) % 360} 90% 55% / ${alpha})`;

function stageOf(image) {
  return image.stages.filter((stage) => stage.at <= Number(slider.value)).at(-1);
}

function paint(canvas, pointed = null) {
  const image = data.images[Number(canvas.dataset.image)];
  const [rows, columns] = image.grid;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d");
  const [wide, high] = [canvas.width / columns, canvas.height / rows];
  const stage = stageOf(image);
  canvas.closest("article").querySelector(".tokens span").textContent =
    [...new Set([image.tokens, ...image.stages.filter((own) => own.at <= Number(slider.value)).map((own) => own.tokens)])].join(" → ");
  if (!stage) return;
  const members = new Map();
  for (const keeper of stage.keeper) members.set(keeper, (members.get(keeper) || 0) + 1);
  const shared = (keeper) => keeper >= 0 && members.get(keeper) > 1;
  const at = (row, column) => (row < 0 || column < 0 || row >= rows || column >= columns ? null : stage.keeper[row * columns + column]);
  const inset = Math.max(1, 0.05 * Math.min(wide, high));
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const [keeper, own] = [at(row, column), row * columns + column];
      const [left, top] = [column * wide, row * high];
      if (keeper < 0) pen.fillStyle = "rgb(12 14 18 / 0.78)";
      else if (keeper !== own) pen.fillStyle = colour(keeper, 0.42);
      else pen.fillStyle = "transparent";
      pen.fillRect(left, top, wide, high);
      const marked = pointed !== null && keeper === pointed;
      if (!shared(keeper) && !marked) continue;
      pen.strokeStyle = marked ? "#ffffff" : colour(keeper, 1);
      pen.lineWidth = inset * (marked ? 2.2 : 1.2);
      pen.beginPath();
      const edges = [[-1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1], [0, -1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1]];
      for (const [down, right, x0, y0, x1, y1] of edges) {
        if (at(row + down, column + right) === keeper) continue;
        const pull = (share) => (share ? -inset : inset);
        pen.moveTo(left + x0 * wide + pull(x0), top + y0 * high + pull(y0));
        pen.lineTo(left + x1 * wide + pull(x1), top + y1 * high + pull(y1));
      }
      pen.stroke();
    }
}

function show() {
  const place = Number(slider.value);
  const text = place === 0 ? "the image" : place === 1 ? "before block 0" : `after block ${place - 2}`;
  document.getElementById("where").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  canvases.forEach((canvas) => paint(canvas));
}

for (const canvas of canvases) {
  canvas.addEventListener("pointermove", (event) => {
    const image = data.images[Number(canvas.dataset.image)];
    const [rows, columns] = image.grid;
    const stage = stageOf(image);
    if (!stage) return;
    const row = Math.min(rows - 1, Math.floor((event.offsetY / canvas.clientHeight) * rows));
    const column = Math.min(columns - 1, Math.floor((event.offsetX / canvas.clientWidth) * columns));
    const keeper = stage.keeper[row * columns + column];
    const count = stage.keeper.filter((other) => other === keeper).length;
    canvas.title = keeper < 0 ? "dropped" : count === 1 ? "a token of its own" : `a token of ${count} patches`;
    paint(canvas, keeper < 0 ? null : keeper);
  });
  canvas.addEventListener("pointerleave", () => paint(canvas));
}
slider.addEventListener("input", show);
window.addEventListener("resize", show);
show();

// Copying.

for (const button of document.querySelectorAll("button[data-copy]"))
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source);
    try { await navigator.clipboard.writeText(source.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "copied";
  });
