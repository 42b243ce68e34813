// The attention explorer: draws frames and sends selections. In a notebook the frames come from Python
// (views/explorer.py), in an exported page from the rows stored in it (PageSource below). No libraries.
//
// A frame: {selection, caption, panels: [{title, kind, low, high, query, origin, radius, model}], facts: one per model
// (and k, side by side), scatters: one per model or none} and bytes:
// for each panel n values, then n flags (1 decoded, 2 selected), n = height * width of the latent grid.

const MEAN = -1;
const DENSE = 0;
const DECODED = 1;
const SELECTED = 2;
// matplotlib's cividis at 16 places, and colours of Okabe and Ito
const CIVIDIS = "00224e002e6c1e3a6f35456c47516c575d6d666970757575848279948e77a59c74b7a96ec8b866dbc75aeed649fee838".match(/../g).map((pair) => parseInt(pair, 16));
const VERMILLION = "#D55E00";
const BLUE = "#0072B2";
const SKY = "#56B4E9";

export const MODES = {
  head: "one head",
  heads: "all heads of the layer",
  ks: "one head, several k",
  pair: "two k side by side",
  cost: "attention against cost",
};

const EXPLAINED = {
  head: "Where this head looks when the chosen latent is predicted: the brighter, the more attention.",
  heads: "The same latent seen by every head of the layer, and their mean, last. Each map has its own scale.",
  ks: "The same head when only the k best-matching positions may take part. The weights are those trained with the model's own k.",
  pair: "The same head of the same model with two k, in all its layers: the maps, and under them what the latent costs with each k. Each map has its own scale.",
  cost:
    "Left: attention. Right: what it costs in bits when the position is hidden from this latent, in all layers and heads at once. " +
    "Orange: hiding it makes the latent dearer, so it helped. Blue: hiding it makes it cheaper. White frames: the positions that were hidden, those that some head looks at.",
};

const ABOUT = `
<p>A learned codec turns the picture into a grid of <b>latents</b>, one for each block of 16 x 16 pixels, each a list of
integers. To store them in few bits it must <b>predict</b> them, and it has two sources: a small side file about the
whole picture (the <b>hyperprior</b>), and the latents that the decoder already knows (the <b>context</b>). The context
is read by a transformer. Its <b>attention</b> says how much each known latent counts in the prediction of the next.
It has several <b>layers</b>, one after the other, and in each several <b>heads</b>, which look at different things.
Only the <b>k</b> best-matching positions take part.</p>
<ul>
<li>The <b style="color:#D55E00">orange square</b> is the latent that is predicted. Click another block, or move it with the arrow keys.</li>
<li>Yellow blocks get much attention, dark blue ones little; the colour goes with the square root. White frames: the k positions that take part.</li>
<li>Shaded, crossed-out blocks are <b>not decoded yet</b>: the prediction may not look at them.</li>
<li>The dashed diamond holds the neighbours whose exact offset the model knows. Outside, all offsets are alike to it.</li>
<li>Bits: what storing this latent costs. The difference of the two numbers is what the context saved.</li>
</ul>`;
const ABOUT_KIND = {
  parallel:
    "decodes in <b>two passes</b> like the two colours of a chessboard. The first pass is predicted by the hyperprior alone; the second sees all of the first, before and after it, and itself.",
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

/** Red, green, blue and alpha of a byte, or null where nothing is painted. */
function colourOf(kind, value) {
  if (kind === "attention") return value ? [...cividis(value / 255), 0.75 + (0.25 * value) / 255] : null;
  const strength = (value - 128) / 127; // cost: the middle is zero
  if (!strength) return null;
  return [...(strength > 0 ? [213, 94, 0] : [0, 114, 178]), 0.45 + 0.55 * Math.abs(strength)];
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

function drawPanel(canvas, meta, picture, panel, values, flags, large) {
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
  paintCells(g, meta, (i) => colourOf(panel.kind, values[i]));
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

function legendOf(panel) {
  const stops = [];
  for (let i = 0; i <= 8; i++) {
    stops.push(panel.kind === "attention" ? `rgb(${cividis(i / 8).join()})` : rgba(colourOf("cost", 1 + (254 * i) / 8) || [255, 255, 255, 1]));
  }
  const [low, high] =
    panel.kind === "attention"
      ? ["0", `${percent(panel.high)} of the attention`]
      : [`${number(-panel.high)}`, `+${number(panel.high)} bits`];
  return `<span class="ef-legend">${low}<i style="background:linear-gradient(90deg,${stops.join()})"></i>${high}</span>`;
}

function sideOf(facts, scatters) {
  const several = facts.length > 1;
  const most = Math.max(...facts.flatMap((f) => [f.bits, f.hyper_bits]), 1e-9);
  const explained = (counts) =>
    `<small>Groups of ${counts} channels, group 1 holds those with the largest values in this picture. ` +
    `Values, means and scales as root mean squares over the group. Scale: how unsure the prediction is.</small>`;
  const bar = (bits, name) => `<div class="ef-bar ${name}" style="width:${((100 * Math.max(bits, 0)) / most).toFixed(1)}%"></div>`;
  return facts
    .map((f, place) => {
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
        `${place < facts.length - 1 ? "" : explained(counts)}</section>` +
        (scatters[place] ? `<section>${scatterOf(scatters[place])}</section>` : "")
      );
    })
    .join("");
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

const SLIDERS = { layer: "layer", head: "head", k: "k", other_k: "k on the right" };

/** Puts an explorer into `root`. source: {meta, send(selection), listen(callback(frame, bytes))}. */
export function mount(root, source) {
  const { meta } = source;
  root.innerHTML =
    `<style>${STYLE}</style><div class="ef-explorer"><details class="ef-about" ${meta.open ? "open" : ""}><summary>What is shown here</summary>` +
    `<div>${ABOUT}${aboutModels(meta.models)}</div></details>` +
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
  };
  for (const [name, { values }] of Object.entries(scales)) {
    const slider = find(`.ef-${name}`);
    Object.assign(slider, { min: 0, max: values.length - 1, step: 1 });
    slider.addEventListener("input", () => source.send({ [name]: values[slider.valueAsNumber] }));
  }
  for (const [mode, words] of Object.entries(MODES)) {
    const button = document.createElement("button");
    Object.assign(button, { textContent: words, type: "button" });
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

  function show(frameOfNow, bytes) {
    last = frameOfNow;
    const { selection, panels } = last;
    const box = find(".ef-panels");
    while (box.children.length < panels.length) box.append(panelFigure(box.children.length));
    while (box.children.length > panels.length) box.lastChild.remove();
    const each = Math.max(...meta.models.map((_, m) => panels.filter((p) => p.model === m).length)); // maps of one model
    const columns = panels.length <= 4 ? Math.min(2, panels.length) : each <= 4 ? each : 3;
    box.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    const n = meta.height * meta.width;
    panels.forEach((panel, i) => {
      const figure = box.children[i];
      figure.style.gridColumnStart = each > 1 && panel.model !== panels[i - 1]?.model ? 1 : "auto"; // a row for each model
      figure.querySelector("figcaption").innerHTML = `<span>${escape(panel.title)}</span>${legendOf(panel)}`;
      const canvas = figure.querySelector("canvas");
      canvas.setAttribute("aria-label", panel.title);
      const [values, flags] = [0, n].map((start) => bytes.subarray(2 * n * i + start, 2 * n * i + start + n));
      drawPanel(canvas, meta, picture, panel, values, flags, panels.length < 3);
    });
    for (const [name, { values, words }] of Object.entries(scales)) {
      const slider = find(`.ef-${name}`);
      if (values.includes(selection[name])) slider.value = values.indexOf(selection[name]);
      slider.nextElementSibling.textContent = words(selection[name]);
      slider.disabled = (name === "head" && selection.mode === "heads") || (name === "k" && selection.mode === "ks");
      slider.parentElement.hidden = name === "other_k" && selection.mode !== "pair";
    }
    for (const button of find(".ef-modes").children) button.setAttribute("aria-pressed", button.dataset.mode === selection.mode);
    find(".ef-caption").textContent = last.caption;
    find(".ef-note").textContent = EXPLAINED[selection.mode] + (last.note ? ` ${last.note}` : "");
    find(".ef-body").classList.toggle("ef-two", panels.length === 2); // the numbers of each under its map
    find(".ef-side").innerHTML = sideOf(last.facts, last.scatters);
  }

  picture.onload = () => source.listen(show);
  picture.src = meta.picture;
}

// ---- the exported page: frames from stored rows ----

async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** The rows stored in a page; answers as the view model in Python does. Layout: views/explorer_page.py. */
export class PageSource {
  static async open(meta, base64) {
    return new PageSource(meta, await inflate(base64));
  }

  constructor(meta, buffer) {
    this.meta = meta;
    this.n = meta.height * meta.width;
    this.sections = meta.sections.map((s) => new Section(s, meta, this.n, buffer));
    this.costs = new Costs(meta.costs, buffer);
    this.selection = { ...meta.selection };
    this.snap();
  }

  listen(callback) {
    this.callback = callback;
    this.tell();
  }

  tell() {
    const { frame: now, bytes } = this.frame();
    this.callback?.(now, bytes);
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
    const { mode, k } = this.selection;
    if (mode === "ks") return this.sections.map((s) => s.sites).reduce((a, b) => (b.length < a.length ? b : a));
    if (mode === "pair") return [k, this.selection.other_k].map((v) => this.section(v).sites).reduce((a, b) => (b.length < a.length ? b : a));
    return mode === "cost" ? this.costs.sites : this.section(k).sites;
  }

  section(k) {
    return this.sections.find((s) => s.k === k);
  }

  step([down, right]) {
    const { row, column } = this.selection;
    const ahead = this.held().filter((site) => {
      const [r, c] = [Math.floor(site / this.meta.width), site % this.meta.width];
      return down ? (r - row) * down > 0 && c === column : (c - column) * right > 0 && r === row;
    });
    const next = down + right > 0 ? ahead[0] : ahead[ahead.length - 1];
    if (next !== undefined) this.go(next);
  }

  go(site) {
    Object.assign(this.selection, { row: Math.floor(site / this.meta.width), column: site % this.meta.width });
  }

  /** Moves the query to the nearest latent that is held; costs are held for one k only. */
  snap() {
    const { height, width, layers, heads, own_k: own } = this.meta;
    const s = this.selection;
    const clip = (v, low, high) => Math.min(Math.max(v, low), high);
    s.layer = clip(s.layer, 0, layers - 1);
    s.head = clip(s.head, MEAN, heads - 1);
    s.row = clip(s.row, 0, height - 1);
    s.column = clip(s.column, 0, width - 1);
    if (s.mode === "cost" || !this.section(s.k)) s.k = own;
    if (!this.section(s.other_k)) s.other_k = DENSE;
    const held = this.held();
    const site = s.row * width + s.column;
    if (held.length === this.n || held.includes(site)) return;
    const distance = (other) => Math.abs(Math.floor(other / width) - s.row) + Math.abs((other % width) - s.column);
    this.go(held.reduce((best, other) => (distance(other) < distance(best) ? other : best)));
  }

  frame() {
    const { layer, head, k, other_k, row, column, mode } = this.selection;
    const { width, heads, name } = this.meta;
    const site = row * width + column;
    const section = this.section(k);
    const words = `layer ${layer}, ${headInWords(head)}, ${kInWords(k)}`;
    let maps;
    if (mode === "heads") {
      maps = [...Array(heads).keys(), MEAN].map((h) => [headInWords(h), section, h]);
    } else if (mode === "ks" || mode === "pair") {
      const ks = mode === "ks" ? this.meta.ks : [k, other_k];
      maps = ks.map((v) => [`${kInWords(v)}: ${this.section(v).facts(site).bits.toFixed(1)} bits`, this.section(v), head]);
    } else {
      maps = [[`attention, ${words}`, section, head]];
    }
    const panels = [];
    const parts = [];
    const decoded = this.decoded(site);
    const add = (title, kind, { values, high, selected }) => {
      panels.push({ title, kind, low: 0, high, query: [row, column], origin: this.origin(site), radius: this.meta.radius, model: 0 });
      parts.push(values, decoded.map((d, i) => (d ? DECODED : 0) | (selected[i] ? SELECTED : 0)));
    };
    for (const [title, from, h] of maps) add(title, "attention", this.toBytes(from.attention(site, layer, h), from.k));
    const scatters = [];
    if (mode === "cost") {
      const { positions, bits } = this.costs.of(site);
      add("cost of its absence, in bits", "cost", this.costBytes(positions, bits));
      const attention = section.attention(site, layer, head);
      const received = positions.map((p) => attention[p]);
      scatters.push({ attention: received, bits, rho: spearman(received, bits) });
    }
    const facts =
      mode === "pair"
        ? [k, other_k].map((v) => ({ name: `${name}, ${kInWords(v)}`, model: 0, ...this.section(v).facts(site) }))
        : [{ name, model: 0, ...section.facts(site) }];
    const bytes = new Uint8Array(parts.length * this.n);
    parts.forEach((part, i) => bytes.set(part, i * this.n));
    const held = this.held();
    const note = held.length < this.n ? `For this view the page holds ${held.length} of ${this.n} latents and takes the nearest.` : "";
    const frame = { selection: { ...this.selection }, caption: this.caption(site, facts), note, panels, facts, scatters };
    return { frame, bytes };
  }

  origin(site) {
    const at = this.meta.kind === "serial" ? Math.max(site - 1, 0) : site;
    return [Math.floor(at / this.meta.width), at % this.meta.width];
  }

  inFirstPass(site) {
    return (Math.floor(site / this.meta.width) + (site % this.meta.width)) % 2 === 1;
  }

  decoded(site) {
    const all = new Uint8Array(this.n);
    if (this.meta.kind === "serial") return all.fill(1, 0, site);
    return this.inFirstPass(site) ? all : all.map((_, i) => this.inFirstPass(i));
  }

  toBytes(attention, k) {
    const high = attention.reduce((a, b) => Math.max(a, b), 0);
    const values = Uint8Array.from(attention, (v) => (high ? Math.round(255 * Math.sqrt(v / high)) : 0));
    return { values, high, selected: k === DENSE ? new Uint8Array(this.n) : Uint8Array.from(attention, (v) => v > 0) };
  }

  costBytes(positions, bits) {
    const high = bits.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    const [values, selected] = [new Uint8Array(this.n).fill(128), new Uint8Array(this.n)];
    positions.forEach((p, i) => {
      values[p] = 128 + Math.round(high ? 127 * Math.sign(bits[i]) * Math.sqrt(Math.abs(bits[i]) / high) : 0);
      selected[p] = 1;
    });
    return { values, high, selected };
  }

  caption(site, facts) {
    const { layer, head, k, other_k, row, column, mode } = this.selection;
    const pass =
      this.meta.kind === "serial"
        ? site ? "sees all latents before it." : "the first, nothing is decoded yet."
        : this.inFirstPass(site)
          ? "first pass, coded without context; its row gathers context for others."
          : "second pass, sees the whole first pass.";
    const what = {
      head: `Layer ${layer}, ${headInWords(head)}, ${kInWords(k)}.`,
      heads: `Layer ${layer}, every head, ${kInWords(k)}.`,
      ks: `Layer ${layer}, ${headInWords(head)}, every k.`,
      pair: `Layer ${layer}, ${headInWords(head)}, ${kInWords(k)} beside ${kInWords(other_k)}.`,
      cost: `Layer ${layer}, ${headInWords(head)}, ${kInWords(k)}, beside the measured cost.`,
    }[mode];
    const [here, other] = facts.map((f) => f.bits.toFixed(1));
    const context = mode === "pair" ? `${here} bits with ${kInWords(k)}, ${other} bits with ${kInWords(other_k)}` : `${here} bits with context`;
    const bits = `${context}, ${facts[0].hyper_bits.toFixed(1)} bits with the hyperprior only.`;
    return `Latent row ${row}, column ${column}: ${pass} ${what} ${bits}`;
  }
}

/** All rows of one k. Sparse: counts, positions and bytes of what is attended; dense: a byte for every site. */
class Section {
  constructor(s, meta, n, buffer) {
    Object.assign(this, { k: s.k, sites: s.sites ?? [...Array(n).keys()], n, meta });
    this.number = new Map(this.sites.map((site, i) => [site, i]));
    const maps = this.sites.length * meta.layers * meta.heads;
    this.factsOf = new Float32Array(buffer, s.facts, this.sites.length * meta.facts_width);
    if (s.dense !== undefined) {
      this.dense = new Uint8Array(buffer, s.dense, maps * n);
      return;
    }
    const counts = new Uint16Array(buffer, s.counts, maps);
    this.starts = new Uint32Array(maps + 1);
    counts.forEach((count, i) => (this.starts[i + 1] = this.starts[i] + count));
    this.positions = new Uint16Array(buffer, s.positions, this.starts[maps]);
    this.bytes = new Uint8Array(buffer, s.bytes, this.starts[maps]);
  }

  /** Attention of one latent: Float32Array [n]; head -1 is the mean. */
  attention(site, layer, head) {
    const { layers, heads } = this.meta;
    const out = new Float32Array(this.n);
    const wanted = head === MEAN ? [...Array(heads).keys()] : [head];
    for (const h of wanted) {
      const map = (this.number.get(site) * layers + layer) * heads + h;
      const put = (position, byte) => (out[position] += (byte / 255) ** 2 / wanted.length);
      if (this.dense) {
        for (let i = 0; i < this.n; i++) put(i, this.dense[map * this.n + i]);
      } else {
        for (let i = this.starts[map]; i < this.starts[map + 1]; i++) put(this.positions[i], this.bytes[i]);
      }
    }
    return out;
  }

  facts(site) {
    const width = this.meta.facts_width;
    const [bits, hyper, ...rest] = this.factsOf.subarray(this.number.get(site) * width, (this.number.get(site) + 1) * width);
    const groups = this.meta.group_channels.map((channels, i) => {
      const [value, mean, scale, b, hb] = rest.slice(5 * i, 5 * i + 5);
      return { channels, value, mean, scale, bits: b, hyper_bits: hb };
    });
    return { bits, hyper_bits: hyper, groups };
  }
}

class Costs {
  constructor(c, buffer) {
    this.sites = c.sites;
    const counts = new Uint16Array(buffer, c.counts, c.sites.length);
    this.starts = [0];
    counts.forEach((count, i) => this.starts.push(this.starts[i] + count));
    this.positions = new Uint16Array(buffer, c.positions, this.starts[c.sites.length]);
    this.bits = new Float32Array(buffer, c.bits, this.starts[c.sites.length]);
  }

  of(site) {
    const i = this.sites.indexOf(site);
    const part = (array) => [...array.subarray(this.starts[i], this.starts[i + 1])];
    return { positions: part(this.positions), bits: part(this.bits) };
  }
}

/** Spearman's rank correlation, equal values sharing their mean rank; null where one does not vary. */
export function spearman(a, b) {
  if (a.length < 3) return null;
  const [x, y] = [ranks(a), ranks(b)];
  const mean = (a.length - 1) / 2;
  const product = (u, v) => u.reduce((sum, value, i) => sum + (value - mean) * (v[i] - mean), 0);
  const size = Math.sqrt(product(x, x) * product(y, y));
  return size > 0 ? product(x, y) / size : null;
}

function ranks(values) {
  const order = [...values.keys()].sort((i, j) => values[i] - values[j]);
  const out = new Array(values.length);
  for (let start = 0; start < order.length; ) {
    let end = start;
    while (end < order.length && values[order[end]] === values[order[start]]) end++;
    for (let i = start; i < end; i++) out[order[i]] = (start + end - 1) / 2;
    start = end;
  }
  return out;
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
        const bytes = model.get("maps");
        callback(model.get("frame"), new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength));
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
