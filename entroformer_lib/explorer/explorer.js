// The attention explorer: draws frames and sends selections. In a notebook the frames come from Python
// (explorer/widget.py), in an exported page from what is stored in it (PageSource below). No libraries.
//
// A frame: {selection, caption, panels: [{title, kind, query, origin, radius, model, shape}], facts: one per model (and k,
// side by side), scatters: one per model or none}, and with it the values of all panels, float32, then their flags (1
// decoded, 2 selected), of each n = rows * columns of its shape: the latent grid, or of kind "groups" G * G.

const MEAN = -1;
const DENSE = 0;
const DECODED = 1;
const SELECTED = 2;
// matplotlib's cividis at 16 places, and colours of Okabe and Ito
const CIVIDIS = "00224e002e6c1e3a6f35456c47516c575d6d666970757575848279948e77a59c74b7a96ec8b866dbc75aeed649fee838".match(/../g).map((pair) => parseInt(pair, 16));
const VERMILLION = "#D55E00";
const BLUE = "#0072B2";
const SKY = "#56B4E9";

// What the modes are called, and what they show: of rows of attention, and of a GroupedMixer.
const ROWS = {
  head: ["one head", "Where this head looks when the chosen latent is predicted: the brighter, the more attention."],
  heads: ["all heads of the layer", "The same latent seen by every head of the layer, and their mean, last. Each map has its own scale."],
  ks: ["one head, several k", "The same head when only the k best-matching positions may take part. The weights are those trained with the model's own k."],
  pair: ["two k side by side", "The same head of the same model with two k, in all its layers: the maps, and under them what the latent costs with each k. Each map has its own scale."],
  cost: [
    "attention against cost",
    "Left: attention. Right: what it costs in bits when the position is hidden from this latent, in all layers and heads at once. " +
      "Orange: hiding it makes the latent dearer, so it helped. Blue: hiding it makes it cheaper. White frames: the positions that were hidden, those that some head looks at.",
  ],
};
const GROUPS = {
  head: [
    "one head",
    "Left: where the inner mixer looks when this slice of the chosen latent is predicted, inside its window. " +
      "Right: how much each group looks at those before it, in the cross mixer at this place; click a row to choose its group.",
  ],
  heads: ["all heads of the inner mixer", "The same latent and slice seen by every head of the inner mixer, and their mean, last. Each map has its own scale."],
  groups: ["all heads of the cross mixer", "The groups at this place seen by every head of the cross mixer, and their mean, last. Click a row to choose its group."],
};

const WHAT = `
<p>A learned codec turns the picture into a grid of <b>latents</b>, one for each block of 16 x 16 pixels, each a list of
integers. To store them in few bits it must <b>predict</b> them, and it has two sources: a small side file about the
whole picture (the <b>hyperprior</b>), and the latents that the decoder already knows (the <b>context</b>). The context
is read by a transformer. Its <b>attention</b> says how much each known latent counts in the prediction of the next.
It has several <b>layers</b>, one after the other, and in each several <b>heads</b>, which look at different things.`;
const QUERY = `
<li>The <b style="color:#D55E00">orange square</b> is the latent that is predicted. Click another block, or move it with the arrow keys.</li>`;
const ABOUT = `${WHAT} Only the <b>k</b> best-matching positions take part.</p>
<ul>${QUERY}
<li>Yellow blocks get much attention, dark blue ones little; the colour goes with the square root. White frames: the k positions that take part.</li>
<li>Shaded, crossed-out blocks are <b>not decoded yet</b>: the prediction may not look at them.</li>
<li>The dashed diamond holds the neighbours whose exact offset the model knows. Outside, all offsets are alike to it.</li>
<li>Bits: what storing this latent costs. The difference of the two numbers is what the context saved.</li>
</ul>`;
const ABOUT_GROUPS = `${WHAT}</p>
<ul>${QUERY}
<li>The <b style="color:#56B4E9">blue frame</b> is the latent of the group before at the same place: what is predicted next is read off its token. The attention lies on latents of that group.</li>
<li>Yellow blocks get much attention, dark blue ones little; the colour goes with the square root. Inside a group attention ends at the border of a <b>window</b>.</li>
<li>Shaded, crossed-out blocks: of them <b>no channel is decoded yet</b>.</li>
<li>The dashed diamond holds the neighbours in the group whose exact offset the model knows.</li>
<li>The table of groups: a row for each group that is predicted, its columns the groups before it. The first column is a start that says nothing of the picture.</li>
</ul>`;
const ABOUT_KIND = {
  parallel:
    "decodes in <b>two passes</b> like the two colours of a chessboard. The first pass is predicted by the hyperprior alone; the second sees all of the first, before and after it, and itself.",
  grouped:
    "is a GroupedMixer (Li et al. 2024). It decodes <b>group after group</b>: the channels are cut into slices, the blocks into interleaved phases, and a group is one slice at one phase. " +
    "Two mixers take turns: the <b>inner mixer</b> looks around among the latents of one group, the <b>cross mixer</b> looks at the earlier groups, at its own place only.",
  serial:
    "decodes <b>one latent after the other</b>, row by row, and sees what came before. The attention shown is that of the latent just before (<b style='color:#56B4E9'>blue frame</b>), which predicts the chosen one; in the first column that is the end of the row above.",
};

const aboutModels = (models) =>
  models.map(({ name, kind }) => `<p>${models.length > 1 ? `Model ${escape(name)}` : "This model"} ${ABOUT_KIND[kind]}</p>`).join("");

const STYLE = `
.ef-explorer { font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; padding: 4px; max-width: 1500px; }
.ef-explorer * { box-sizing: border-box; }
.ef-controls { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; margin: 6px 0; }
.ef-controls label { display: inline-flex; gap: 8px; align-items: center; white-space: nowrap; }
.ef-controls label[hidden] { display: none; }
.ef-controls output { min-width: 8em; } .ef-layer + output { min-width: 4em !important; }
.ef-controls input[type=range] { width: 100px; accent-color: ${BLUE}; }
.ef-break { flex-basis: 100%; }
.ef-modes { display: inline-flex; border: 1px solid #777; border-radius: 4px; overflow: hidden; }
.ef-modes button { border: 0; background: #fff; color: #1a1a1a; padding: 4px 10px; font: inherit; cursor: pointer; }
.ef-modes button + button { border-left: 1px solid #777; }
.ef-modes button[aria-pressed=true] { background: ${BLUE}; color: #fff; }
.ef-caption { font-weight: 600; min-height: 1.5em; }
.ef-note { color: #444; margin: 2px 0 6px; }
.ef-body { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.ef-panels { flex: 3 1 480px; display: grid; gap: 10px; align-items: end; min-width: 0; }
.ef-panel { margin: 0; min-width: 0; }
.ef-panel figcaption { font-size: 13px; display: flex; justify-content: space-between; align-items: center; gap: 2px 8px; flex-wrap: wrap; }
.ef-legend { display: inline-flex; gap: 5px; align-items: center; font-size: 12px; color: #333; white-space: nowrap; }
.ef-legend i { display: inline-block; width: 70px; height: 9px; border: 1px solid #999; }
.ef-panel canvas.ef-groups { max-width: 640px; }
.ef-side tr.ef-chosen { font-weight: 600; background: #FBE8DC; }
.ef-panel canvas { width: 100%; display: block; cursor: crosshair; touch-action: manipulation; }
.ef-panel canvas:focus-visible { outline: 3px solid ${SKY}; }
.ef-side { flex: 1 1 290px; max-width: 400px; }
.ef-side h3 { font-size: 14px; margin: 0 0 4px; overflow-wrap: anywhere; }
.ef-side section + section { margin-top: 14px; }
.ef-two .ef-panels { flex-basis: 100%; }
.ef-two .ef-side { flex-basis: 100%; max-width: none; display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
.ef-two .ef-side section { margin: 0; max-width: 480px; }
.ef-bits { display: grid; grid-template-columns: auto 1fr; gap: 2px 8px; align-items: center; }
.ef-bits b { text-align: right; font-variant-numeric: tabular-nums; }
.ef-bar { height: 10px; background: ${BLUE}; }
.ef-bar.alone { background: #8a8a8a; }
.ef-side table { border-collapse: collapse; width: 100%; font-size: 12.5px; margin: 8px 0; font-variant-numeric: tabular-nums; }
.ef-side th { font-weight: 600; border-bottom: 1px solid #777; }
.ef-side td, .ef-side th { text-align: right; padding: 1px 0 1px 8px; vertical-align: bottom; }
.ef-side td:first-child, .ef-side th:first-child { text-align: left; padding-left: 0; }
.ef-scatter { max-width: 400px; }
.ef-side small { color: #444; display: block; }
.ef-about { margin: 6px 0; } .ef-about summary { cursor: pointer; font-weight: 600; }
.ef-about > div { columns: 2 420px; column-gap: 36px; } .ef-about p { margin: 4px 0; } .ef-about ul { margin: 4px 0; padding-left: 20px; }
`;

// ---- colours ----

function cividis(t) {
  const place = Math.min(Math.max(t, 0), 1) * 15;
  const i = Math.min(Math.floor(place), 14);
  const mix = (c) => {
    const [a, b] = [CIVIDIS[3 * i + c], CIVIDIS[3 * i + 3 + c]];
    return Math.round(a + (b - a) * (place - i));
  };
  return [mix(0), mix(1), mix(2)];
}

/** Red, green, blue and alpha of a strength from -1 to 1, or null where nothing is painted. */
function colourOf(kind, strength) {
  if (Math.abs(strength) < 0.5 / 255) return null;
  if (kind !== "cost") return [...cividis(strength), 0.75 + 0.25 * strength];
  return [...(strength > 0 ? [213, 94, 0] : [0, 114, 178]), 0.45 + 0.55 * Math.abs(strength)];
}

const largest = (values) => values.reduce((most, v) => Math.max(most, Math.abs(v)), 0);

/** Values on a square-root scale, the largest as 1. */
function strengthsOf(values) {
  const high = largest(values) || 1;
  return values.map((v) => Math.sign(v) * Math.sqrt(Math.abs(v) / high));
}

// ---- drawing ----

const sheets = new Map(); // canvases that are used again

function sheet(name, width, height) {
  if (!sheets.has(name)) sheets.set(name, document.createElement("canvas"));
  const canvas = sheets.get(name);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return canvas;
}

/** The picture in pale grey, because the colours are for the map. The filter is slow, so it runs once for each size. */
function backdrop(picture, width, height) {
  const made = (picture.backdrops ??= new Map());
  if (!made.has(width)) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const g = canvas.getContext("2d");
    g.filter = "grayscale(1) contrast(0.7) brightness(1.2)";
    g.drawImage(picture, 0, 0, width, height);
    made.set(width, canvas);
  }
  return made.get(width);
}

/** One pixel for each latent, enlarged. colour(i): [red, green, blue, alpha] or null. */
function paintCells(g, meta, colour) {
  const small = sheet("cells", meta.width, meta.height);
  const pixels = new ImageData(meta.width, meta.height);
  for (let i = 0; i < meta.width * meta.height; i++) {
    const [red, green, blue, alpha] = colour(i) || [0, 0, 0, 0];
    pixels.data.set([red, green, blue, 255 * alpha], 4 * i);
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  g.imageSmoothingEnabled = false;
  g.drawImage(small, 0, 0, g.canvas.width, g.canvas.height);
}

function drawPanel(canvas, meta, picture, panel, strengths, flags, large) {
  const cell = Math.max(4, Math.round((large ? 1152 : 640) / meta.width));
  const [w, h] = [meta.width * cell, meta.height * cell];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const g = canvas.getContext("2d");
  g.drawImage(backdrop(picture, w, h), 0, 0);
  const stroke = (colour, width, path) => {
    Object.assign(g, { strokeStyle: colour, lineWidth: width });
    g.beginPath();
    path();
    g.stroke();
  };
  const each = (bit, path) => {
    for (let i = 0; i < flags.length; i++) if (bit(flags[i])) path((i % meta.width) * cell, Math.floor(i / meta.width) * cell);
  };
  paintCells(g, meta, (i) => (flags[i] & DECODED ? null : [30, 30, 30, 0.3]));
  // a stroke through what is not decoded, so that the difference does not hang on brightness
  stroke(`rgba(0,0,0,${large ? 0.4 : 0.25})`, Math.min(Math.max(1, cell / 24), 2), () =>
    each((flag) => !(flag & DECODED), (x, y) => line(g, x, y + cell, x + cell, y)),
  );
  paintCells(g, meta, (i) => colourOf(panel.kind, strengths[i]));
  stroke("rgba(255,255,255,0.14)", 1, () => {
    for (let c = 1; c < meta.width; c++) line(g, c * cell + 0.5, 0, c * cell + 0.5, h);
    for (let r = 1; r < meta.height; r++) line(g, 0, r * cell + 0.5, w, r * cell + 0.5);
  });
  stroke("#fff", Math.min(Math.max(1, cell / (large ? 14 : 10)), 3), () =>
    each((flag) => flag & SELECTED, (x, y) => g.rect(x + 1, y + 1, cell - 2, cell - 2)),
  );
  drawDiamond(g, panel.origin, panel.radius, cell);
  if (String(panel.origin) !== String(panel.query)) frame(g, panel.origin, cell, SKY);
  frame(g, panel.query, cell, VERMILLION);
}

/** A table of groups: a row for each that is predicted, a column for each that is seen; the chosen row is framed. */
function drawGroups(canvas, { counts, order }, panel, strengths, flags) {
  const count = order.length;
  const cell = Math.max(10, Math.round(560 / count));
  const pad = 3.4 * 13;
  const [w, h] = [pad + count * cell + 2, pad + count * cell + 2];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const g = canvas.getContext("2d");
  g.fillStyle = "#fff";
  g.fillRect(0, 0, w, h);
  for (let i = 0; i < flags.length; i++) {
    const [x, y] = [pad + (i % count) * cell, pad + Math.floor(i / count) * cell];
    const colour = flags[i] & DECODED ? [...cividis(strengths[i]), 1] : [225, 225, 225, 1];
    g.fillStyle = rgba(colour);
    g.fillRect(x, y, cell, cell);
  }
  const places = counts[1] * counts[2];
  const rules = (every, colour, width) => {
    Object.assign(g, { strokeStyle: colour, lineWidth: width });
    g.beginPath();
    for (let i = 0; i < count; i += every) {
      line(g, pad + (i + 1) * cell, pad, pad + (i + 1) * cell, h - 2); // columns begin with the start
      line(g, pad, pad + i * cell, w - 2, pad + i * cell);
    }
    g.stroke();
  };
  rules(1, "rgba(255,255,255,0.5)", 1);
  const sliceBySlice = order.findIndex(([slice]) => slice > 0) === places;
  if (sliceBySlice) rules(places, "#fff", 3);
  g.fillStyle = "#1a1a1a";
  g.font = "13px system-ui, sans-serif";
  const step = Math.ceil(22 / cell);
  g.textBaseline = "middle";
  for (let i = 0; i < count; i += step) {
    g.textAlign = "right";
    g.fillText(String(i), pad - 5, pad + (i + 0.5) * cell);
    g.textAlign = "center";
    if (i || cell < 34) g.fillText(i ? String(i - 1) : "s", pad + (i + 0.5) * cell, pad - 10);
    else g.fillText("start", pad + 0.5 * cell, pad - 10);
  }
  g.fillText("looks at group", pad + (count * cell) / 2, 12);
  g.save();
  g.translate(10, pad + (count * cell) / 2);
  g.rotate(-Math.PI / 2);
  g.fillText("group that is predicted", 0, 0);
  g.restore();
  const row = panel.query[0];
  for (const [stroke, width] of [["#fff", 6], [VERMILLION, 3]]) {
    Object.assign(g, { strokeStyle: stroke, lineWidth: width });
    g.strokeRect(pad, pad + row * cell, (row + 1) * cell, cell);
  }
  canvas.table = { pad: pad / w, cell: cell / w };
}

function line(g, x0, y0, x1, y1) {
  g.moveTo(x0, y0);
  g.lineTo(x1, y1);
}

function frame(g, [row, column], cell, colour) {
  const thick = Math.min(cell, 26);
  for (const [stroke, width] of [["#fff", thick / 2.6], [colour, thick / 4.5]]) {
    g.strokeStyle = stroke;
    g.lineWidth = Math.max(2, width);
    g.strokeRect(column * cell, row * cell, cell, cell);
  }
}

function drawDiamond(g, [row, column], radius, cell) {
  g.strokeStyle = "#fff";
  g.setLineDash([cell / 3, cell / 4]);
  g.lineWidth = Math.min(Math.max(1, cell / 10), 3);
  g.beginPath();
  for (let dy = -radius; dy <= radius; dy++) {
    const reach = radius - Math.abs(dy);
    const [left, right] = [(column - reach) * cell, (column + reach + 1) * cell];
    const [top, bottom] = [(row + dy) * cell, (row + dy + 1) * cell];
    for (const x of [left, right]) {
      g.moveTo(x, top);
      g.lineTo(x, bottom);
    }
    const edge = dy < 0 ? top : bottom; // the steps between this row and the next one out
    if (dy <= 0) stairs(g, left, right, row + dy === row - radius ? null : cell, top);
    if (dy >= 0) stairs(g, left, right, dy === radius ? null : cell, edge);
  }
  g.stroke();
  g.setLineDash([]);
}

function stairs(g, left, right, step, y) {
  if (step === null) {
    g.moveTo(left, y);
    g.lineTo(right, y);
    return;
  }
  for (const [from, to] of [[left, left + step], [right - step, right]]) {
    g.moveTo(from, y);
    g.lineTo(to, y);
  }
}

// ---- words ----

export function number(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 1 ? 1 : 2);
}

const percent = (value) => (value >= 0.0995 ? `${(100 * value).toFixed(0)}%` : `${(100 * value).toPrecision(2)}%`);

export const headInWords = (head) => (head === MEAN ? "mean over heads" : `head ${head}`);
export const kInWords = (k) => (k === DENSE ? "dense" : `k = ${k}`);

const rgba = (colour) => `rgba(${colour.join()})`;

function legendOf(kind, most) {
  const stops = [];
  for (let i = 0; i <= 8; i++) {
    stops.push(kind !== "cost" ? `rgb(${cividis(i / 8).join()})` : rgba(colourOf("cost", i / 4 - 1) || [255, 255, 255, 1]));
  }
  const [low, high] = kind !== "cost" ? ["0", `${percent(most)} of the attention`] : [`${number(-most)}`, `+${number(most)} bits`];
  return `<span class="ef-legend">${low}<i style="background:linear-gradient(90deg,${stops.join()})"></i>${high}</span>`;
}

function sideOf(facts, scatters) {
  const several = facts.length > 1;
  const most = Math.max(...facts.flatMap((f) => [f.bits, f.hyper_bits ?? 0]), 1e-9);
  const explained = (counts) =>
    `<small>Groups of ${counts} channels, group 1 holds those with the largest values in this picture. ` +
    `Values, means and scales as root mean squares over the group. Scale: how unsure the prediction is.</small>`;
  const bar = (bits, name) => `<div class="ef-bar ${name}" style="width:${((100 * Math.max(bits, 0)) / most).toFixed(1)}%"></div>`;
  return facts
    .map((f, place) => {
      if (f.slice !== undefined) return slicesOf(f, several, bar(f.bits, ""));
      const saved = f.hyper_bits - f.bits;
      const rows = f.groups.map(
        (g, i) =>
          `<tr><td>${i + 1}</td><td>${number(g.value)}</td><td>${number(g.mean)}</td>` +
          `<td>${number(g.scale)}</td><td>${number(g.bits)}</td><td>${number(g.hyper_bits)}</td></tr>`,
      );
      const counts = [...new Set(f.groups.map((g) => g.channels))].sort((a, b) => a - b).join(" or ");
      return (
        `<section><h3>${several ? escape(f.name) : "What this latent costs"}</h3><div class="ef-bits">` +
        `<span>with all context</span><b>${number(f.bits)} bits</b><span></span>${bar(f.bits, "")}` +
        `<span>hyperprior only</span><b>${number(f.hyper_bits)} bits</b><span></span>${bar(f.hyper_bits, "alone")}` +
        `<span>context ${saved >= 0 ? "saves" : "costs"}</span><b>${number(Math.abs(saved))} bits</b></div>` +
        `<table><thead><tr><th>channel group</th><th>actual value</th><th>predicted mean</th><th>predicted scale</th><th>bits</th><th>bits, hyper&shy;prior only</th></tr></thead>` +
        `<tbody>${rows.join("")}</tbody></table>` +
        `${place < facts.findLastIndex(({ slice }) => slice === undefined) ? "" : explained(counts)}</section>` +
        (scatters[place] ? `<section>${scatterOf(scatters[place])}</section>` : "")
      );
    })
    .join("");
}

/** The side panel of a GroupedMixer: what each channel slice of the latent costs. */
function slicesOf(f, several, bar) {
  const chosen = f.groups[f.slice];
  const rows = f.groups.map(
    (g, i) =>
      `<tr${i === f.slice ? ' class="ef-chosen"' : ""}><td>${i}</td><td>${g.group}</td><td>${number(g.value)}</td>` +
      `<td>${number(g.mean)}</td><td>${number(g.scale)}</td><td>${number(g.bits)}</td></tr>`,
  );
  return (
    `<section><h3>${several ? escape(f.name) : "What this latent costs"}</h3><div class="ef-bits">` +
    `<span>all its channels</span><b>${number(f.bits)} bits</b><span></span>${bar}` +
    `<span>slice ${f.slice}</span><b>${number(chosen.bits)} bits</b></div>` +
    `<table><thead><tr><th>channel slice</th><th>coded as group</th><th>actual value</th><th>predicted mean</th><th>predicted scale</th><th>bits</th></tr></thead>` +
    `<tbody>${rows.join("")}</tbody></table>` +
    `<small>Slices of ${chosen.channels} channels. Values, means and scales as root mean squares over the slice. ` +
    `Scale: how unsure the prediction is.</small></section>`
  );
}

function scatterOf({ attention, bits, rho }) {
  if (!attention.length) return "<p>This latent is coded without context, so there is nothing to hide.</p>";
  const [w, h, pad] = [300, 210, 42];
  const top = Math.max(...attention, 1e-9);
  const reach = Math.max(...bits.map(Math.abs), 1e-9);
  const x = (v) => pad + (w - pad - 8) * Math.sqrt(v / top);
  const y = (v) => h / 2 - 8 - (h / 2 - 22) * Math.sign(v) * Math.sqrt(Math.abs(v) / reach);
  const dots = attention.map(
    (a, i) => `<circle cx="${x(a).toFixed(1)}" cy="${y(bits[i]).toFixed(1)}" r="3" fill="${bits[i] > 0 ? VERMILLION : BLUE}" fill-opacity="0.6"/>`,
  );
  const words = rho === null ? "no rank correlation: one of the two does not vary" : `Spearman's rank correlation ${rho.toFixed(2)}`;
  return (
    `<h3>Attention against cost</h3><svg class="ef-scatter" viewBox="0 0 ${w} ${h}" width="100%" role="img" aria-label="${words}" font-size="11">` +
    `<path d="M${pad} 8V${h - 24}M${pad} ${y(0)}H${w - 6}" stroke="#555" fill="none"/>${dots.join("")}` +
    `<text x="${pad - 4}" y="${y(reach) + 8}" text-anchor="end">+${number(reach)}</text><text x="${pad - 4}" y="${y(0) + 4}" text-anchor="end">0</text>` +
    `<text x="${pad - 4}" y="${y(-reach)}" text-anchor="end">${number(-reach)}</text><text x="${w - 6}" y="${y(0) + 13}" text-anchor="end">${percent(top)}</text>` +
    `<text x="${(w + pad) / 2}" y="${h - 4}" text-anchor="middle">attention received (both axes square-root)</text>` +
    `<text transform="translate(10 ${h / 2 - 8}) rotate(-90)" text-anchor="middle">bits its absence costs</text></svg>` +
    `<small>${attention.length} positions; ${words}.</small>`
  );
}

const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

// ---- the explorer ----

const SLIDERS = { layer: "layer", head: "head", k: "k", other_k: "k on the right", slice: "channel slice" };

/** Puts an explorer into `root`. source: {meta, send(selection), listen(callback(frame, maps, flags))}. */
export function mount(root, source) {
  const { meta } = source;
  const grouped = meta.models.every(({ kind }) => kind === "grouped");
  const words = grouped ? GROUPS : ROWS;
  root.innerHTML =
    `<style>${STYLE}</style><div class="ef-explorer"><details class="ef-about" ${meta.open ? "open" : ""}><summary>What is shown here</summary>` +
    `<div>${grouped ? ABOUT_GROUPS : ABOUT}${aboutModels(meta.models)}</div></details>` +
    `<div class="ef-controls"><span class="ef-modes" role="group" aria-label="what to show"></span><span class="ef-break"></span>` +
    Object.entries(SLIDERS).map(([n, words]) => `<label>${words} <input type="range" class="ef-${n}" aria-label="${words}"><output></output></label>`).join("") +
    `</div><div class="ef-caption" aria-live="polite"></div><div class="ef-note"></div>` +
    `<div class="ef-body"><div class="ef-panels"></div><div class="ef-side"></div></div></div>`;
  root.addEventListener("keydown", (event) => {
    if (/^(Arrow|Page|Home|End)/.test(event.key)) event.stopPropagation(); // else JupyterLab takes them
  });
  const find = (name) => root.querySelector(name);
  const picture = new Image();
  let last = null;
  const owners = (k) => meta.models.filter((m) => m.own_k === k).map((m) => m.name);
  const kWords = (k) => kInWords(k) + (owners(k).length === meta.models.length ? " (its own)" : owners(k).map((name) => ` (${name}'s own)`).join(""));
  const scales = {
    layer: { values: [...Array(meta.layers).keys()], words: (v) => `${v} (0 to ${meta.layers - 1})` },
    head: { values: [MEAN, ...Array(meta.heads).keys()], words: (v) => (v === MEAN ? "mean over heads" : `${v} (0 to ${meta.heads - 1})`) },
    k: { values: meta.ks, words: kWords },
    other_k: { values: meta.ks, words: kWords },
    slice: { values: [...Array(meta.slices).keys()], words: (v) => `${v} (0 to ${meta.slices - 1})` },
  };
  for (const [name, { values }] of Object.entries(scales)) {
    const slider = find(`.ef-${name}`);
    Object.assign(slider, { min: 0, max: values.length - 1, step: 1 });
    slider.addEventListener("input", () => source.send({ [name]: values[slider.valueAsNumber] }));
  }
  for (const mode of Object.keys(meta.modes)) {
    const button = document.createElement("button");
    Object.assign(button, { textContent: words[mode][0], type: "button" });
    button.dataset.mode = mode;
    button.addEventListener("click", () => source.send({ mode }));
    find(".ef-modes").append(button);
  }

  function panelFigure(index) {
    const figure = document.createElement("figure");
    figure.className = "ef-panel";
    figure.innerHTML = `<figcaption></figcaption><canvas tabindex="0" role="img"></canvas>`;
    const canvas = figure.querySelector("canvas");
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const panel = last.panels[index];
      if (panel.kind === "groups") {
        const row = Math.floor(((event.clientY - box.top) / box.height - canvas.table.pad) / canvas.table.cell);
        if (row >= 0 && row < panel.shape[0]) source.send(siteOfGroup(meta.models[panel.model], last.selection, row));
        return;
      }
      const place = (offset, size, count) => Math.min(Math.max(Math.floor((offset / size) * count), 0), count - 1);
      source.send({
        row: place(event.clientY - box.top, box.height, meta.height),
        column: place(event.clientX - box.left, box.width, meta.width),
      });
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || !last) return;
      event.preventDefault();
      source.send({ by: step });
    });
    return figure;
  }

  function show(frameOfNow, maps, flags) {
    last = frameOfNow;
    const { selection, panels } = last;
    const box = find(".ef-panels");
    while (box.children.length < panels.length) box.append(panelFigure(box.children.length));
    while (box.children.length > panels.length) box.lastChild.remove();
    const each = Math.max(...meta.models.map((_, m) => panels.filter((p) => p.model === m).length)); // maps of one model
    const columns = panels.length <= 4 ? Math.min(2, panels.length) : each <= 4 ? each : 3;
    const besideTable = panels.length === 2 && panels[0].kind !== "groups" && panels[1].kind === "groups";
    box.style.gridTemplateColumns = besideTable ? "minmax(0, 5fr) minmax(0, 3fr)" : `repeat(${columns}, minmax(0, 1fr))`;
    box.style.alignItems = panels.some((panel) => panel.kind === "groups") ? "start" : "";
    let start = 0;
    panels.forEach((panel, i) => {
      const figure = box.children[i];
      figure.style.gridColumnStart = each > 1 && panel.model !== panels[i - 1]?.model ? 1 : "auto"; // a row for each model
      const end = start + panel.shape[0] * panel.shape[1];
      const [values, marks] = [maps, flags].map((all) => all.subarray(start, end));
      start = end;
      figure.querySelector("figcaption").innerHTML = `<span>${escape(panel.title)}</span>${legendOf(panel.kind, largest(values))}`;
      const canvas = figure.querySelector("canvas");
      canvas.setAttribute("aria-label", panel.title);
      canvas.classList.toggle("ef-groups", panel.kind === "groups");
      if (panel.kind === "groups") drawGroups(canvas, meta.models[panel.model], panel, strengthsOf(values), marks);
      else drawPanel(canvas, meta, picture, panel, strengthsOf(values), marks, panels.length < 3);
    });
    for (const [name, { values, words: inWords }] of Object.entries(scales)) {
      const slider = find(`.ef-${name}`);
      if (values.includes(selection[name])) slider.value = values.indexOf(selection[name]);
      slider.nextElementSibling.textContent = inWords(selection[name]);
      slider.disabled = (name === "head" && ["heads", "groups"].includes(selection.mode)) || (name === "k" && selection.mode === "ks");
      slider.parentElement.hidden = values.length < 2 || (name === "other_k" && selection.mode !== "pair");
    }
    for (const button of find(".ef-modes").children) button.setAttribute("aria-pressed", button.dataset.mode === selection.mode);
    find(".ef-caption").textContent = last.caption;
    find(".ef-note").textContent = words[selection.mode][1] + (last.note ? ` ${last.note}` : "");
    find(".ef-body").classList.toggle("ef-two", panels.length === 2); // the numbers of each under its map
    find(".ef-side").innerHTML = sideOf(last.facts, last.scatters);
  }

  picture.onload = () => source.listen(show);
  picture.src = meta.picture;
}

/** The choice of a row in a table of groups: its channel slice, and the site of its phase at the same place. */
function siteOfGroup({ counts: [, down, right], order }, { row, column }, group) {
  const [slice, i, j] = order[group];
  return { row: row - (row % down) + i, column: column - (column % right) + j, slice };
}

// ---- the exported page: frames from stored rows ----

async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** What is stored in a page; answers as the view model in Python does. Layout: explorer/page.py. */
export class PageSource {
  static async open(meta, base64) {
    return new PageSource(meta, await inflate(base64));
  }

  constructor(meta, buffer) {
    this.meta = meta;
    this.n = meta.height * meta.width;
    const queries = this.n * meta.slices;
    const numbers = (start, count) => new Uint16Array(buffer, start, count);
    this.sections = meta.sections.map((s) => new Section(s, meta, buffer));
    this.costs = meta.costs && new Costs(meta.costs, meta, buffer);
    [this.steps, this.origins, this.sentence] = [meta.steps, meta.origins, meta.sentence].map((start) => numbers(start, queries));
    this.when = numbers(meta.when, this.n);
    if (meta.cross) {
      this.groups = meta.models[0].order.length;
      this.place = numbers(meta.cross.place, this.n);
      this.cross = new Uint8Array(buffer, meta.cross.bytes, meta.cross.count * meta.layers * meta.heads * this.groups ** 2);
    }
    this.selection = { ...meta.selection };
    this.snap();
  }

  listen(callback) {
    this.callback = callback;
    this.tell();
  }

  tell() {
    this.callback?.(...this.frame());
  }

  /** Takes parts of a selection, or {by: [rows, columns]}, a step to the next latent that the page holds. */
  send({ by, ...changes }) {
    const s = this.selection;
    Object.assign(s, changes);
    if (by) this.step(by);
    this.snap();
    this.tell();
  }

  /** The sites that hold everything the present mode shows. */
  held() {
    const ks = this.maps().map((map) => map.k);
    const sites = [...ks.map((k) => this.section(k).sites), ...(this.selection.mode === "cost" ? [this.costs.sites] : [])];
    return sites.reduce((a, b) => (b.length < a.length ? b : a));
  }

  section(k) {
    return this.sections.find((s) => s.k === k);
  }

  step([down, right]) {
    const { row, column } = this.selection;
    const ahead = this.held().filter((site) => {
      const [r, c] = this.at(site);
      return down ? (r - row) * down > 0 && c === column : (c - column) * right > 0 && r === row;
    });
    const next = down + right > 0 ? ahead[0] : ahead[ahead.length - 1];
    if (next !== undefined) this.go(next);
  }

  /** Row and column of a site. */
  at(site) {
    return [Math.floor(site / this.meta.width), site % this.meta.width];
  }

  go(site) {
    [this.selection.row, this.selection.column] = this.at(site);
  }

  /** Moves the query to the nearest latent that is held; costs are held for one k only. */
  snap() {
    const { height, width, layers, heads, models } = this.meta;
    const s = this.selection;
    const clip = (v, low, high) => Math.min(Math.max(v, low), high);
    s.layer = clip(s.layer, 0, layers - 1);
    s.head = clip(s.head, MEAN, heads - 1);
    s.slice = clip(s.slice, 0, this.meta.slices - 1);
    s.row = clip(s.row, 0, height - 1);
    s.column = clip(s.column, 0, width - 1);
    if (s.mode === "cost" || !this.section(s.k)) s.k = models[0].own_k;
    if (!this.section(s.other_k)) s.other_k = DENSE;
    const held = this.held();
    const site = s.row * width + s.column;
    if (held.length === this.n || held.includes(site)) return;
    const distance = (other) => Math.abs(this.at(other)[0] - s.row) + Math.abs(this.at(other)[1] - s.column);
    this.go(held.reduce((best, other) => (distance(other) < distance(best) ? other : best)));
  }

  /** The maps of the present mode, with the head and the k that are chosen. */
  maps() {
    const chosen = (value) => (typeof value === "string" ? this.selection[value] : value);
    return this.meta.modes[this.selection.mode].maps.map((map) => ({ ...map, head: chosen(map.head), k: chosen(map.k) }));
  }

  /** The frame, and what its panels show: values, then flags. */
  frame() {
    const { k, other_k, row, column, slice, mode } = this.selection;
    const { name } = this.meta.models[0];
    const site = row * this.meta.width + column;
    const query = site * this.meta.slices + slice;
    const { what, bits } = this.meta.modes[mode];
    const shown = this.maps().map((map) => this.panel(map, site, query));
    const several = mode === "pair";
    const facts = (several ? [k, other_k] : [k]).map((v) => ({ name: several ? `${name}, ${kInWords(v)}` : name, model: 0, ...this.facts(site, v) }));
    const caption = `Latent row ${row}, column ${column}: ${this.meta.sentences[this.sentence[query]]} ${this.filled(`${what} ${bits}`, site, this.selection)}`;
    const held = this.held();
    const note = held.length < this.n ? `For this view the page holds ${held.length} of ${this.n} latents and takes the nearest.` : "";
    const scatters = mode === "cost" ? [this.scatter(site)] : [];
    const frame = { selection: { ...this.selection }, caption, note, panels: shown.map((s) => s.panel), facts, scatters };
    const joined = (kind, name) => kind.from(shown.flatMap((s) => [...s[name]]));
    return [frame, joined(Float32Array, "values"), joined(Uint8Array, "flags")];
  }

  panel({ title, kind, head, k }, site, query) {
    const { layer, row, column } = this.selection;
    const { height, width, models } = this.meta;
    const panel = { title: this.filled(title, site, { head, k }), kind, query: [row, column], origin: this.at(this.origins[query]), radius: models[0].radius, model: 0, shape: [height, width] };
    if (kind === "groups") {
      const at = [this.steps[query], 0];
      const flags = Uint8Array.from({ length: this.groups ** 2 }, (_, i) => (i % this.groups <= Math.floor(i / this.groups) ? DECODED : 0));
      Object.assign(panel, { query: at, origin: at, radius: 0, shape: [this.groups, this.groups] });
      return { panel, values: this.amongGroups(site, layer, head), flags };
    }
    let values, selected;
    if (kind === "cost") {
      const { positions, bits } = this.costs.of(site);
      values = new Float32Array(this.n);
      positions.forEach((p, i) => (values[p] = bits[i]));
      const hidden = new Set(positions);
      selected = (i) => hidden.has(i);
    } else {
      values = this.section(k).attention(site, layer, head, query % this.meta.slices);
      selected = (i) => k !== DENSE && values[i] > 0;
    }
    const flags = Uint8Array.from(this.when, (when, i) => (when < this.steps[query] ? DECODED : 0) | (selected(i) ? SELECTED : 0));
    return { panel, values, flags };
  }

  /** Attention of the cross mixer at a site's place: Float32Array [G * G]. */
  amongGroups(site, layer, head) {
    const { layers, heads } = this.meta;
    const size = this.groups ** 2;
    const out = new Float32Array(size);
    forHeads(head, heads, (h, share) => {
      const start = ((this.place[site] * layers + layer) * heads + h) * size;
      for (let i = 0; i < size; i++) out[i] += share * (this.cross[start + i] / 255) ** 2;
    });
    return out;
  }

  facts(site, k) {
    const { slice } = this.selection;
    const { slices, models } = this.meta;
    const facts = this.section(k).facts(site, slice);
    if (models[0].order) Object.assign(facts, { slice, groups: facts.groups.map((g, i) => ({ ...g, group: this.steps[site * slices + i] })) });
    return facts;
  }

  scatter(site) {
    const { layer, head, k } = this.selection;
    const { positions, bits, rho } = this.costs.of(site, layer, head);
    const attention = this.section(k).attention(site, layer, head);
    return { attention: positions.map((p) => attention[p]), bits, rho };
  }

  /** Fills the holes in the words of a mode, see `Exploration.filled`. */
  filled(words, site, { head, k }) {
    const { layer, other_k, slice } = this.selection;
    const bits = (value) => value.toFixed(1);
    const fill = {
      layer: () => layer,
      head: () => headInWords(head),
      k: () => kInWords(k),
      other_k: () => kInWords(other_k),
      bits: () => bits(this.facts(site, k).bits),
      other_bits: () => bits(this.facts(site, other_k).bits),
      alone: () => bits(this.facts(site, k).hyper_bits),
      part: () => bits(this.facts(site, k).groups[slice].bits),
    };
    return words.replace(/\{(\w+)\}/g, (_, name) => fill[name]());
  }
}

/** Calls back for a head, or for all with their share in the mean. */
function forHeads(head, heads, callback) {
  if (head !== MEAN) callback(head, 1);
  else for (let h = 0; h < heads; h++) callback(h, 1 / heads);
}

const sumsOf = (counts) => {
  const sums = new Uint32Array(counts.length + 1);
  counts.forEach((count, i) => (sums[i + 1] = sums[i] + count));
  return sums;
};

/** All rows of one k: counts, positions and bytes of what is attended. */
class Section {
  constructor(s, meta, buffer) {
    Object.assign(this, { k: s.k, sites: s.sites, meta });
    this.number = new Map(s.sites.map((site, i) => [site, i]));
    const queries = s.sites.length * meta.slices; // site by site, in each its channel slices
    const maps = queries * meta.layers * meta.heads;
    this.width = 2 + 5 * meta.group_channels.length;
    this.factsOf = new Float32Array(buffer, s.facts, queries * this.width);
    this.starts = sumsOf(new Uint16Array(buffer, s.counts, maps));
    this.positions = new Uint16Array(buffer, s.positions, this.starts[maps]);
    this.bytes = new Uint8Array(buffer, s.bytes, this.starts[maps]);
  }

  /** The number of a site's channel slice among what is held. */
  query(site, slice) {
    return this.number.get(site) * this.meta.slices + slice;
  }

  /** Attention of one latent: Float32Array [n]; head -1 is the mean. */
  attention(site, layer, head, slice = 0) {
    const { height, width, layers, heads } = this.meta;
    const out = new Float32Array(height * width);
    forHeads(head, heads, (h, share) => {
      const map = (this.query(site, slice) * layers + layer) * heads + h;
      for (let i = this.starts[map]; i < this.starts[map + 1]; i++) out[this.positions[i]] += share * (this.bytes[i] / 255) ** 2;
    });
    return out;
  }

  facts(site, slice) {
    const query = this.query(site, slice);
    const known = (v) => (Number.isNaN(v) ? null : v);
    const [bits, hyper_bits, ...rest] = [...this.factsOf.subarray(query * this.width, (query + 1) * this.width)].map(known);
    const groups = this.meta.group_channels.map((channels, i) => {
      const [value, mean, scale, b, hb] = rest.slice(5 * i, 5 * i + 5);
      return { channels, value, mean, scale, bits: b, hyper_bits: hb };
    });
    return { bits, hyper_bits, groups };
  }
}

/** Measured costs, and how attention ranks them. */
class Costs {
  constructor(c, { layers, heads }, buffer) {
    Object.assign(this, { sites: c.sites, layers, heads });
    this.starts = sumsOf(new Uint16Array(buffer, c.counts, c.sites.length));
    this.positions = new Uint16Array(buffer, c.positions, this.starts[c.sites.length]);
    this.bits = new Float32Array(buffer, c.bits, this.starts[c.sites.length]);
    this.rho = new Float32Array(buffer, c.rho, c.sites.length * layers * (heads + 1));
  }

  of(site, layer = 0, head = MEAN) {
    const i = this.sites.indexOf(site);
    const part = (array) => [...array.subarray(this.starts[i], this.starts[i + 1])];
    const rho = this.rho[(i * this.layers + layer) * (this.heads + 1) + (head === MEAN ? this.heads : head)];
    return { positions: part(this.positions), bits: part(this.bits), rho: Number.isNaN(rho) ? null : rho };
  }
}

/** Opens the exported page. */
export async function openPage(root, meta, base64) {
  mount(root, await PageSource.open(meta, base64));
}

// ---- the widget: frames from Python ----

function render({ model, el }) {
  const source = {
    meta: model.get("meta"),
    send({ by, ...changes }) {
      const { row, column } = model.get("frame").selection;
      model.send(by ? { row: row + by[0], column: column + by[1] } : changes);
    },
    listen(callback) {
      const show = () => {
        const [frame, { buffer, byteOffset, byteLength }] = [model.get("frame"), model.get("maps")];
        const bytes = buffer.slice(byteOffset, byteOffset + byteLength); // five bytes a place: a float32 and a flag
        callback(frame, new Float32Array(bytes, 0, byteLength / 5), new Uint8Array(bytes, (4 * byteLength) / 5));
      };
      model.on("change:frame", show);
      show();
      this.stop = () => model.off("change:frame", show);
    },
  };
  mount(el, source);
  return () => source.stop?.();
}

export default { render };
