// The panel beside the picture: what the chosen block costs, what context saves, the legend, tables and small charts.
import { ATTENTION, CHEAPER, DEARER, cividis, rgba } from "./drawing.js";
import { TERMS, aloneInWords, escape, headInWords, kInWords, number, percent } from "./words.js";

const term = (words, name) => `<abbr title="${TERMS[name]}">${words}</abbr>`;
const bar = (share, name) =>
  `<div class="ef-length ${name}" style="width:${(100 * Math.max(share, 0)).toFixed(1)}%"></div>`;

/** What `alone` is measured with; its name where the pointer rests. */
const withTitle = (model) =>
  model.reference ? `<abbr title="${escape(model.reference)}">${aloneInWords(model)}</abbr>` : aloneInWords(model);

/** The sentence that a reader sees first, and two bars under it. one: {model, query, step, facts} */
export function verdict(one, several, label = "") {
  const { model, facts, step, before } = one;
  const title = several || label ? `<h3>${escape(label || model.name)}</h3>` : "";
  if (!facts) return `<section>${title}</section>`;
  const cost =
    `<p class="ef-verdict">This ${term("block", "block")} costs <b>${number(facts.bits)} bits</b>.</p>` +
    (before === undefined ? "" : `<p><b>Changed:</b> it was ${number(before)} bits.</p>`);
  if (model.kind === "parallel" && !step) {
    const source = model.hyperprior ? `from the ${term("hyperprior", "hyperprior")} alone` : "without context";
    return (
      `<section>${title}${cost}<p>It belongs to the <b>first pass</b>: it is predicted ${source}, ` +
      `and no attention takes part in that.</p>` +
      `<p><button type="button" class="ef-nearest" data-model="${one.number}">Nearest block of the second pass</button></p>` +
      `<label class="ef-check"><input type="checkbox" class="ef-gathers"> show where it looks for the sake of others</label></section>`
    );
  }
  if (facts.alone === null || facts.alone === undefined) {
    const slice =
      facts.slice === undefined
        ? ""
        : `<p>Slice ${facts.slice} of its channels: <b>${number(facts.groups[facts.slice].bits)} bits</b>.</p>`;
    return `<section>${title}${cost}${slice}</section>`;
  }
  const saved = facts.alone - facts.bits;
  const most = Math.max(facts.alone, facts.bits, 1e-9);
  const share = facts.alone > 0 ? ` (${percent(Math.abs(saved) / facts.alone)})` : "";
  const does = saved >= 0 ? "saves" : "makes it worse by";
  const length = (words, bits, name) => `<span>${words}</span><b>${number(bits)}</b>${bar(bits / most, name)}`;
  return (
    `<section>${title}${cost}<p>${term("Context", "context")} ${does} <b>${number(Math.abs(saved))} bits</b>${share}: ` +
    `${withTitle(model)} needs ${number(facts.alone)}.</p>` +
    `<div class="ef-bits">${length("with context", facts.bits, "")}${length("without", facts.alone, "alone")}</div></section>`
  );
}

/** What context saves in the whole picture, once all blocks are known. */
export function wholePicture(model, { bits, alone }, several) {
  if (!alone) return "";
  const sum = (values, there = () => true) =>
    values.reduce((total, v, query) => total + (there(model.steps[query]) ? v : 0), 0);
  const kB = (b) => `${(b / 8000).toFixed(1)} kB`;
  const [spent, without] = [sum(bits), sum(alone)];
  const change = (a, b) => `context ${a <= b ? "saves" : "costs"} <b>${percent(Math.abs(1 - a / b))}</b>`;
  const passes = () => {
    const [first, second, other] = [sum(bits, (step) => !step), sum(bits, (step) => step), sum(alone, (step) => step)];
    const saved = `${kB(second)} instead of ${kB(other)}: ${change(second, other)}`;
    return ` The second pass, ${saved}. The first pass, ${kB(first)}, has no context.`;
  };
  const side = model.z_bits ? ` and ${kB(model.z_bits)} of side file` : "";
  const by = several ? ` by ${escape(model.name)}` : "";
  return (
    `<p class="ef-whole">Whole picture${by}: ${kB(spent)} for all blocks${side}; ${withTitle(model)} needs ` +
    `${kB(without)} for the blocks: ${change(spent, without)}.${model.kind === "parallel" ? passes() : ""}</p>`
  );
}

/** Values and predictions of the groups of channels. */
export function channelTable({ model, facts }, steps) {
  if (!facts) return "";
  const grouped = facts.slice !== undefined;
  const alone = !grouped && facts.alone !== null;
  const head = [
    grouped ? "slice" : "group",
    ...(grouped ? ["coded as group"] : []),
    "value",
    "mean",
    "scale",
    "bits",
    ...(alone ? ["bits without context"] : []),
  ];
  const rows = facts.groups.map((g, i) => {
    const cells = [
      i + (grouped ? 0 : 1),
      ...(grouped ? [steps[i]] : []),
      ...[g.value, g.mean, g.scale, g.bits, ...(alone ? [g.alone] : [])].map(number),
    ];
    return `<tr${grouped && i === facts.slice ? ' class="ef-chosen"' : ""}>${cells.map((c) => `<td>${c}</td>`).join("")}</tr>`;
  });
  const order = grouped ? "" : " Group 1 holds the channels with the largest values in this picture.";
  return (
    `<table><thead><tr>${head.map((h) => `<th>${h}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>` +
    `<small>Value, mean and scale are root mean squares over the channels of a ${grouped ? "slice" : "group"}. ` +
    `The scale says how unsure the prediction is.${order}</small>`
  );
}

/** What colours and frames of a map mean. shown: {kind, most, selected, origin, radius, padding, k} */
export function legend(shown) {
  const ramp = (stops) => `<i class="ef-ramp" style="background:linear-gradient(90deg,${stops.join()})"></i>`;
  const at = [0, 0.25, 0.5, 0.75, 1];
  const entries = [];
  const root = "<small>(square-root scale)</small>";
  if (shown.kind === "attention") {
    const strongest = shown.alone ? `block: ${percent(shown.most)} of the attention` : "block of each map";
    entries.push(`<div>0 ${ramp(at.map((t) => rgba(ATTENTION, 0.9 * t)))} strongest ${strongest} ${root}</div>`);
  }
  if (shown.cost !== undefined) {
    const both = ramp([-1, -0.5, 0, 0.5, 1].map((t) => rgba(t > 0 ? DEARER : CHEAPER, Math.abs(t))));
    entries.push(`<div>fewer bits ${both} more bits if hidden, up to ${number(shown.cost)} ${root}</div>`);
  }
  if (shown.backdrop === 2)
    entries.push(
      `<div>0 ${ramp(at.map((t) => rgba(cividis(t))))} ${number(shown.backdropMost)} bits spent <small>(even scale)</small></div>`,
    );
  if (shown.backdrop === 3)
    entries.push(
      `<div>costs ${ramp([rgba(DEARER), "#fff", rgba(CHEAPER)])} saves, up to ${number(shown.backdropMost)} bits ` +
        `<small>(square-root scale); grey: no context</small></div>`,
    );
  entries.push(`<div><i class="ef-key ef-query"></i>the block that is predicted</div>`);
  if (shown.origin) entries.push(`<div><i class="ef-key ef-origin"></i>the block whose token predicts it</div>`);
  if (shown.selected)
    entries.push(
      `<div><i class="ef-key ef-taken"></i>${shown.selected}${shown.cost === undefined ? "" : "; on the second map, those that were hidden to measure their cost"}</div>`,
    );
  if (shown.radius)
    entries.push(`<div><i class="ef-key ef-diamond"></i>near blocks: the model knows their exact place</div>`);
  if (shown.hidden) entries.push(`<div><i class="ef-key ef-hidden">×</i>hidden from all others</div>`);
  if (shown.padding) entries.push(`<div><i class="ef-key ef-pad"></i>padding, outside of the picture</div>`);
  return entries.join("");
}

/** Attention against measured cost, as a scatter plot. */
export function scatter({ attention, bits, rho }) {
  if (!attention.length) return "<p>No other block takes part, so there is nothing to hide.</p>";
  const [w, h, pad] = [300, 210, 42];
  const [top, reach] = [Math.max(...attention, 1e-9), Math.max(...bits.map(Math.abs), 1e-9)];
  const x = (v) => pad + (w - pad - 8) * Math.sqrt(v / top);
  const y = (v) => h / 2 - 8 - (h / 2 - 22) * Math.sign(v) * Math.sqrt(Math.abs(v) / reach);
  const dots = attention.map(
    (a, i) =>
      `<circle cx="${x(a).toFixed(1)}" cy="${y(bits[i]).toFixed(1)}" r="3" fill="${rgba(bits[i] > 0 ? DEARER : CHEAPER, 0.6)}"/>`,
  );
  const words = Number.isNaN(rho)
    ? "no rank correlation, one of the two does not vary"
    : `Spearman's rank correlation ${rho.toFixed(2).replace(/^-(0\.00)$/, "$1")}`;
  const text = (at, words, more = "") => `<text x="${at[0]}" y="${at[1]}" fill="currentColor" ${more}>${words}</text>`;
  return (
    `<h3>Attention against cost</h3><svg class="ef-scatter" viewBox="0 0 ${w} ${h}" width="100%" role="img" aria-label="${words}" font-size="11">` +
    `<path d="M${pad} 8V${h - 24}M${pad} ${y(0)}H${w - 6}" stroke="currentColor" fill="none"/>${dots.join("")}` +
    text([pad - 4, y(reach) + 8], `+${number(reach)}`, 'text-anchor="end"') +
    text([pad - 4, y(0) + 4], "0", 'text-anchor="end"') +
    text([pad - 4, y(-reach)], number(-reach), 'text-anchor="end"') +
    text([w - 6, y(0) + 13], percent(top), 'text-anchor="end"') +
    text([(w + pad) / 2, h - 4], "attention (both axes square-root)", 'text-anchor="middle"') +
    `<text fill="currentColor" transform="translate(10 ${h / 2 - 8}) rotate(-90)" text-anchor="middle">bits its absence costs</text></svg>` +
    `<small>${attention.length} positions; ${words}.</small>`
  );
}

/** One head's calculation opened, from scores to bits. c: the source's answer; s: the selection. */
export function calculation(meta, s, c) {
  const who = meta.models.length > 1 ? `${escape(meta.models[0].name)}: ` : "";
  if (!c) return `<p>${who}This block is coded without context, so there is no calculation to open.</p>`;
  const keys = [...c.probs.keys()].filter((i) => c.selected[i]).sort((a, b) => c.probs[b] - c.probs[a]);
  const rows = keys.slice(0, 12).map((i) => {
    const [row, column] = [Math.floor(i / meta.width), i % meta.width];
    const cells = [
      `${row}, ${column}`,
      number(c.content[i]),
      number(c.position[i]),
      number(c.scores[i]),
      percent(c.probs[i]),
    ];
    return `<tr>${cells.map((v) => `<td>${v}</td>`).join("")}<td>${bar(c.probs[i] / c.probs[keys[0]], "")}</td></tr>`;
  });
  const visible = c.scores.reduce((count, v) => count + Number.isFinite(v), 0);
  const most = Math.max(...c.probabilities);
  const bins = [...c.probabilities].map((p, i) => {
    const chosen = c.first + i === c.value;
    return `<i class="${chosen ? "ef-chosen" : ""}" style="height:${Math.max((100 * p) / most, 0.5).toFixed(1)}%" title="${c.first + i}: ${percent(p)}"></i>`;
  });
  const p = 2 ** -c.bits;
  return (
    `<h3>${who}Layer ${s.layer}, ${headInWords(s.head)}, channel ${s.channel}</h3><ol class="ef-steps">` +
    `<li><b>Scores.</b> The block is compared with each of the ${visible} that it may see, itself among them: a product of contents, and a term for the position.</li>` +
    `<li><b>Top k.</b> The ${keys.length} highest scores take part (${kInWords(s.k)}). <b>Softmax</b> turns them into shares.</li></ol>` +
    `<table class="ef-keys"><thead><tr><th>row, column</th><th>content</th><th>position</th><th>score</th><th>share</th><th></th></tr></thead><tbody>${rows.join("")}</tbody></table>` +
    (keys.length > 12 ? `<small>The first 12 of ${keys.length}.</small>` : "") +
    `<ol class="ef-steps" start="3"><li><b>Prediction.</b> After all layers${meta.models[0].hyperprior ? ", with the hyperprior" : ""}: mean ${number(c.mean)}, scale ${number(c.scale)}.</li>` +
    `<li><b>Probability.</b> The probability of each integer from that bell curve; the true value is <b>${c.value}</b>, with ${percent(p)}.</li>` +
    `<li><b>Bits.</b> -log2 ${p.toPrecision(3)} = <b>${c.bits.toFixed(2)} bits</b> for this channel.</li></ol>` +
    `<div class="ef-bins" role="img" aria-label="probability of each integer from ${c.first} on">${bins.join("")}</div><div class="ef-ends"><span>${c.first}</span><span>${c.first + bins.length - 1}</span></div>`
  );
}
