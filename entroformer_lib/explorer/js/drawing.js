// Draws maps on canvases: the picture underneath, what a map says by the opacity of one hue, frames. No state, no words.
import { MEAN } from "./words.js";

export const ATTENTION = [255, 0, 190]; // a hue that photographs seldom have
export const DEARER = [213, 94, 0]; // orange and blue of Okabe and Ito
export const CHEAPER = [0, 114, 178];
export const DIAMOND = "#ffe600"; // told apart from the white frames
export const QUERY = "#D55E00";
export const ORIGIN = "#56B4E9";
// matplotlib's cividis at 16 places
const CIVIDIS = "00224e002e6c1e3a6f35456c47516c575d6d666970757575848279948e77a59c74b7a96ec8b866dbc75aeed649fee838"
  .match(/../g)
  .map((pair) => parseInt(pair, 16));

export const largest = (values) => values.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
export const rgba = (colour, alpha = 1) => `rgba(${colour.join()},${alpha})`;

export function cividis(t) {
  const place = Math.min(Math.max(t, 0), 1) * 15;
  const i = Math.min(Math.floor(place), 14);
  return [0, 1, 2].map((c) =>
    Math.round(CIVIDIS[3 * i + c] + (CIVIDIS[3 * i + 3 + c] - CIVIDIS[3 * i + c]) * (place - i)),
  );
}

/** Red, green, blue, alpha of a value of a map whose largest value is `most`; null where nothing is painted. */
export function colourOf(kind, value, most) {
  const strength = Math.sqrt(Math.abs(value) / (most || 1));
  if (strength < 0.02) return null;
  if (kind === "cost") return [...(value > 0 ? DEARER : CHEAPER), 0.35 + 0.6 * strength];
  return [...ATTENTION, 0.12 + 0.78 * strength];
}

/** One head's map among those of all layers and heads, or the mean over heads.  probs: [layers * heads * n] */
export function ofHead(probs, heads, n, layer, head) {
  const part = (h) => probs.subarray((layer * heads + h) * n, (layer * heads + h + 1) * n);
  if (head !== MEAN) return part(head);
  const mean = new Float32Array(n);
  for (let h = 0; h < heads; h++) part(h).forEach((p, i) => (mean[i] += p / heads));
  return mean;
}

function sized(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

/** A small canvas with one pixel for each latent. colour(i): [red, green, blue, alpha] or null. */
export function cells(meta, colour) {
  const canvas = document.createElement("canvas");
  const g = sized(canvas, meta.width, meta.height);
  const pixels = new ImageData(meta.width, meta.height);
  for (let i = 0; i < meta.width * meta.height; i++) {
    const [red, green, blue, alpha] = colour(i) ?? [0, 0, 0, 0];
    pixels.data.set([red, green, blue, 255 * alpha], 4 * i);
  }
  g.putImageData(pixels, 0, 0);
  return canvas;
}

const MOST_PIXELS = 8192; // of a canvas, on a side

/** Bits spent on each block, or saved by context, as a canvas of one pixel a block, and the largest value. What is no
 * number has no context. */
export function bitsMap(meta, kind, values) {
  const most = largest(values.map((v) => v || 0));
  if (kind === "spent") return { most, canvas: cells(meta, (i) => [...cividis(values[i] / (most || 1)), 1]) };
  const white = (colour, t) => colour.map((c) => Math.round(255 + (c - 255) * t));
  const shade = (v) => white(v > 0 ? CHEAPER : DEARER, Math.sqrt(Math.abs(v) / (most || 1)));
  return {
    most,
    canvas: cells(meta, (i) => (Number.isNaN(values[i]) ? [150, 150, 150, 1] : [...shade(values[i]), 1])),
  };
}

const line = (g, x0, y0, x1, y1) => (g.moveTo(x0, y0), g.lineTo(x1, y1));

function stroke(g, colour, width, path) {
  Object.assign(g, { strokeStyle: colour, lineWidth: width });
  g.beginPath();
  path();
  g.stroke();
}

/** The backdrop alone, as a canvas. */
export function backdropCanvas(width, height, { backdrops, position }) {
  const canvas = document.createElement("canvas");
  drawBackdrop(sized(canvas, width, height), backdrops, position);
  return canvas;
}

/** Draws a backdrop between two of the pictures: position 1.3 is mostly the second and a little of the third. */
function drawBackdrop(g, backdrops, position) {
  const low = Math.min(Math.floor(position), backdrops.length - 1);
  g.clearRect(0, 0, g.canvas.width, g.canvas.height);
  const shown = [
    [backdrops[low], 1],
    [backdrops[low + 1], position - low],
  ];
  for (const [picture, alpha] of shown) {
    if (!picture || alpha <= 0) continue;
    g.globalAlpha = alpha;
    g.imageSmoothingEnabled = picture instanceof HTMLImageElement;
    g.drawImage(picture, 0, 0, g.canvas.width, g.canvas.height);
  }
  g.globalAlpha = 1;
}

/** Grey stripes over what is padding: outside of the picture, inside the grid. */
function drawPadding(g, meta) {
  const [w, h] = [g.canvas.width, g.canvas.height];
  const [left, top, width, height] = meta.inside.map((v) => (v / (16 * meta.width)) * w);
  if (width >= w - 0.5 && height >= h - 0.5) return;
  g.save();
  g.beginPath();
  g.rect(0, 0, w, h);
  g.rect(left, top, width, height);
  g.clip("evenodd");
  g.fillStyle = "rgba(128,128,128,0.75)";
  g.fillRect(0, 0, w, h);
  stroke(g, "rgba(255,255,255,0.7)", 2, () => {
    for (let x = -h; x < w; x += 12) line(g, x, h, x + h, 0);
  });
  g.restore();
}

/** Pixels of a block on a canvas of about this width; a high one stays within what browsers draw. */
const cellOf = (meta, width) =>
  Math.max(4, Math.min(Math.round(width / meta.width), Math.floor(MOST_PIXELS / meta.height)));

/** A map over the picture. view: {backdrops, position, overlay, values, kind, most, decoded(i), selected(i), query, origin, radius,
 * hidden: crossed-out sites, dim, large} */
export function drawMap(canvas, meta, view) {
  const cell = cellOf(meta, view.large ? 1152 : 640);
  const [w, h] = [meta.width * cell, meta.height * cell];
  const g = sized(canvas, w, h);
  drawBackdrop(g, view.backdrops, view.position);
  const paint = (small, alpha) => {
    Object.assign(g, { imageSmoothingEnabled: false, globalAlpha: alpha });
    g.drawImage(small, 0, 0, w, h);
    g.globalAlpha = 1;
  };
  if (view.dim) {
    paint(
      cells(meta, (i) => (view.decoded(i) ? null : [0, 0, 0, 0.55])),
      1,
    );
    stroke(g, "rgba(255,255,255,0.45)", Math.max(1, cell / 20), () => {
      for (let i = 0; i < meta.width * meta.height; i++) {
        const [x, y] = [(i % meta.width) * cell, Math.floor(i / meta.width) * cell];
        if (!view.decoded(i)) line(g, x, y + cell, x + cell, y);
      }
    });
  }
  if (view.values)
    paint(
      cells(meta, (i) => colourOf(view.kind, view.values[i], view.most)),
      view.overlay,
    );
  if (view.values && view.overlay) {
    for (const [colour, width, inset] of [
      ["rgba(0,0,0,0.55)", Math.min(Math.max(2, cell / 8), 5), 1],
      ["#fff", Math.min(Math.max(1, cell / 14), 3), 1],
    ]) {
      stroke(g, colour, width, () => {
        for (let i = 0; i < view.values.length; i++)
          if (view.selected(i))
            g.rect(
              (i % meta.width) * cell + inset,
              Math.floor(i / meta.width) * cell + inset,
              cell - 2 * inset,
              cell - 2 * inset,
            );
      });
    }
  }
  for (const [colour, width] of [
    ["#fff", Math.max(4, cell / 4)],
    ["#000", Math.max(2, cell / 8)],
  ]) {
    stroke(g, colour, width, () => {
      for (const site of view.hidden) {
        const [x, y] = [(site % meta.width) * cell, Math.floor(site / meta.width) * cell];
        line(g, x, y, x + cell, y + cell);
        line(g, x, y + cell, x + cell, y);
      }
    });
  }
  if (view.values && view.large && view.overlay) writeValues(g, meta, view, cell);
  drawPadding(g, meta);
  if (view.values && view.radius) drawDiamond(g, view.origin, view.radius, cell);
  if (String(view.origin) !== String(view.query)) frame(g, view.origin, cell, ORIGIN);
  frame(g, view.query, cell, QUERY);
}

/** The strongest blocks in numbers, so that the map is read without its colours: percent of the attention, or bits.
 * ->  [[site, words]] */
export function strongest({ values, kind }) {
  const order = [...values.keys()].filter((i) => values[i]).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
  const bits = (v) => `${v > 0 ? "+" : "−"}${Math.abs(v).toFixed(Math.abs(v) < 10 ? 1 : 0)}`;
  const share = (v) => (100 * v).toFixed(v < 0.0095 ? 1 : 0);
  return order.slice(0, 5).map((i) => [i, kind === "cost" ? bits(values[i]) : share(values[i])]);
}

function writeValues(g, meta, view, cell) {
  Object.assign(g, {
    font: `600 ${Math.max(9, Math.round(cell * 0.42))}px system-ui, sans-serif`,
    textAlign: "center",
    textBaseline: "middle",
    lineWidth: 3,
    strokeStyle: "rgba(0,0,0,0.65)",
    fillStyle: "#fff",
  });
  for (const [i, words] of strongest(view)) {
    const [x, y] = [((i % meta.width) + 0.5) * cell, (Math.floor(i / meta.width) + 0.5) * cell];
    g.strokeText(words, x, y);
    g.fillText(words, x, y);
  }
}

function frame(g, [row, column], cell, colour) {
  const thick = Math.min(cell, 26);
  for (const [edge, width] of [
    ["#fff", thick / 2.6],
    [colour, thick / 4.5],
  ]) {
    Object.assign(g, { strokeStyle: edge, lineWidth: Math.max(2, width) });
    g.strokeRect(column * cell, row * cell, cell, cell);
  }
}

/** Edges of the diamond around a block, in blocks: [[x0, y0, x1, y1]]. */
export function diamond(radius) {
  const edges = [];
  for (let dy = -radius; dy <= radius; dy++) {
    const reach = radius - Math.abs(dy);
    const [left, right] = [-reach, reach + 1];
    for (const x of [left, right]) edges.push([x, dy, x, dy + 1]);
    for (const [y, outer, there] of [
      [dy, -radius, dy <= 0],
      [dy + 1, radius, dy >= 0],
    ]) {
      if (!there) continue;
      if (dy === outer) edges.push([left, y, right, y]);
      else for (const x of [left, right - 1]) edges.push([x, y, x + 1, y]);
    }
  }
  return edges;
}

/** The dashed border of the neighbours whose exact offset the model knows. */
function drawDiamond(g, [row, column], radius, cell) {
  for (const [colour, width] of [
    ["rgba(0,0,0,0.6)", 5],
    [DIAMOND, 3],
  ]) {
    g.setLineDash([cell / 3, cell / 4]);
    stroke(g, colour, Math.min(Math.max(1, (width * cell) / 24), width), () => {
      for (const [x0, y0, x1, y1] of diamond(radius))
        line(g, (column + x0) * cell, (row + y0) * cell, (column + x1) * cell, (row + y1) * cell);
    });
  }
  g.setLineDash([]);
}

/** A picture between the guess and what is decoded. shares: of each block what has arrived, 0 to 1 */
export function drawDecoding(canvas, meta, { guess, decoded, shares, query }) {
  const cell = cellOf(meta, 1152);
  const [w, h] = [meta.width * cell, meta.height * cell];
  const g = sized(canvas, w, h);
  g.fillStyle = "#8a8a8a";
  g.fillRect(0, 0, w, h);
  if (guess) g.drawImage(guess, 0, 0, w, h);
  if (decoded) {
    const layer = document.createElement("canvas");
    const over = sized(layer, w, h);
    over.imageSmoothingEnabled = false;
    over.drawImage(
      cells(meta, (i) => [0, 0, 0, shares[i]]),
      0,
      0,
      w,
      h,
    );
    over.globalCompositeOperation = "source-in";
    over.drawImage(decoded, 0, 0, w, h);
    g.drawImage(layer, 0, 0);
  }
  drawPadding(g, meta);
  frame(g, query, cell, QUERY);
}

/** A table of groups: a row for each that is predicted, a column for each that is seen; the chosen row is framed.
 * The first row has only the start to look at, so it says nothing and sets no scale. */
export function drawGroups(canvas, order, values, chosen) {
  const count = order.length;
  const [cell, pad] = [Math.max(10, Math.round(560 / count)), 3.6 * 13];
  const size = pad + count * cell + 2;
  const g = sized(canvas, size, size);
  g.fillStyle = "#fff";
  g.fillRect(0, 0, size, size);
  const most = largest(values.subarray(count));
  for (let i = 0; i < values.length; i++) {
    const [row, column] = [Math.floor(i / count), i % count];
    g.fillStyle = column > row ? "#eee" : row ? rgba(cividis(Math.sqrt(values[i] / (most || 1)))) : "#bbb";
    g.fillRect(pad + column * cell, pad + row * cell, cell - 1, cell - 1);
  }
  Object.assign(g, { fillStyle: "#1a1a1a", font: "13px system-ui, sans-serif", textBaseline: "middle" });
  const step = Math.ceil(22 / cell);
  for (let i = 0; i < count; i += step) {
    g.textAlign = "right";
    g.fillText(String(i), pad - 5, pad + (i + 0.5) * cell);
    g.textAlign = "center";
    g.fillText(i ? String(i - 1) : "start", pad + (i + 0.5) * cell, pad - 10);
  }
  g.fillText("looks at group", pad + (count * cell) / 2, 12);
  g.save();
  g.translate(10, pad + (count * cell) / 2);
  g.rotate(-Math.PI / 2);
  g.fillText("predicted group", 0, 0);
  g.restore();
  for (const [edge, width] of [
    ["#fff", 6],
    [QUERY, 3],
  ]) {
    Object.assign(g, { strokeStyle: edge, lineWidth: width });
    g.strokeRect(pad, pad + chosen * cell, (chosen + 1) * cell, cell);
  }
  canvas.table = { pad: pad / size, cell: cell / size };
  return most;
}
