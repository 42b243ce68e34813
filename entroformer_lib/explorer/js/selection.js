// What is chosen, always something that exists; and which maps a mode shows of it.
import { DENSE, MEAN, MODES, headInWords, kInWords } from "./words.js";

const between = (value, low, high) => Math.min(Math.max(value, low), high);
const clip = (value, low, high) => between(Math.round(value), low, high);
const most = (meta, name) => Math.max(...meta.models.map((model) => model[name]));

/** The modes that all models of a source offer. */
export function modesOf(meta) {
  const grouped = meta.models.some(({ kind }) => kind === "grouped");
  const all = meta.models.every(({ kind, cross }) => kind === "grouped" && cross);
  const offered = { ks: !grouped, pair: !grouped, groups: all, cost: meta.costs, calculation: meta.calculation };
  return Object.keys(MODES).filter((mode) => offered[mode] ?? true);
}

/** All k that some model offers, dense last. */
export const ksOf = (meta) =>
  [...new Set(meta.models.flatMap(({ ks }) => ks))].sort((a, b) => (a || Infinity) - (b || Infinity));

/** The last background that there is: a GroupedMixer without a reference does not say what context saves. */
export const mostBackdrop = ({ models: [{ kind, reference }] }) => (kind !== "grouped" || reference ? 3 : 2);

/** The selection before, with what is wanted; what nobody has chosen gets its usual value. What is too high or too low
 * becomes the nearest, and what makes no sense is passed over. */
export function settled(meta, wanted, before) {
  const [first] = meta.models;
  const usual = {
    row: Math.floor(meta.height / 2),
    column: Math.floor(meta.width / 2),
    slice: 1,
    layer: first.layer ?? first.layers - 1,
    head: 0,
    channel: first.channel_groups[0][0],
    k: first.own_k,
    other_k: DENSE,
    mode: "head",
    backdrop: 0,
    overlay: 1,
    dim: false,
    gathers: false,
    part: 0.4,
    hidden: [],
    off: [],
    position: true,
  };
  if (first.kind === "parallel" && (usual.row + usual.column) % 2)
    usual.column += usual.column + 1 < meta.width ? 1 : -1;
  const s = { ...usual, ...before };
  for (const [name, value] of Object.entries(wanted)) if (name in usual && alike(value, usual[name])) s[name] = value;
  s.row = clip(s.row, 0, meta.height - 1);
  s.column = clip(s.column, 0, meta.width - 1);
  s.slice = clip(s.slice, 0, most(meta, "slices") - 1);
  s.layer = clip(s.layer, 0, most(meta, "layers") - 1);
  s.head = clip(s.head, MEAN, most(meta, "heads") - 1);
  s.channel = clip(s.channel, 0, first.channel_groups.flat().length - 1);
  const ks = ksOf(meta);
  for (const name of ["k", "other_k"]) if (!ks.includes(s[name])) s[name] = name === "k" ? first.own_k : DENSE;
  if (!modesOf(meta).includes(s.mode)) s.mode = "head";
  if (s.mode === "cost" && meta.costs === "own_k") s.k = first.own_k; // a page holds costs for that alone
  if (s.mode === "calculation" && s.head === MEAN) s.head = 0;
  s.backdrop = between(s.backdrop, 0, mostBackdrop(meta));
  for (const name of ["overlay", "part"]) s[name] = between(s[name], 0, 1);
  s.hidden = s.hidden.filter((site) => Number.isInteger(site) && site >= 0 && site < meta.height * meta.width);
  s.off = s.off.filter((pair) => Array.isArray(pair) && pair.length === 2 && pair.every(Number.isInteger));
  return s;
}

/** Whether a value that somebody wrote can stand where a usual one stands. */
function alike(value, usual) {
  if (typeof usual === "number") return typeof value === "number" && !Number.isNaN(value);
  return typeof value === typeof usual && Array.isArray(value) === Array.isArray(usual);
}

/** Whether a block lies wholly in the padding, outside of the picture. */
export function isPadding({ inside: [left, top, width, height] }, { row, column }) {
  const outside = (at, from, size) => 16 * (at + 1) <= from || 16 * at >= from + size;
  return outside(column, left, width) || outside(row, top, height);
}

/** What a selection asks of a model: the site, or of a GroupedMixer this site's channel slice. */
export const queryOf = (meta, model, s) =>
  (s.row * meta.width + s.column) * model.slices + Math.min(s.slice, model.slices - 1);

/** The what-if of a selection, null where nothing is changed. */
export function changeOf(s) {
  return s.hidden.length || s.off.length || !s.position ? { hidden: s.hidden, off: s.off, position: s.position } : null;
}

/** The maps of the present mode: {model: its number, kind, head, k, layer, title}. */
export function mapsOf(meta, s) {
  return meta.models.flatMap((model, number) => {
    const [layer, head] = [Math.min(s.layer, model.layers - 1), Math.min(s.head, model.heads - 1)];
    const grouped = model.kind === "grouped";
    const who = meta.models.length > 1 ? `${model.name}: ` : "";
    const map = (more) => ({ model: number, kind: "attention", layer, head, k: grouped ? DENSE : s.k, ...more });
    const every = (kind) =>
      [...Array(model.heads).keys(), MEAN].map((h) => map({ kind, head: h, title: who + headInWords(h) }));
    const usual = `${who}${grouped ? "inner mixer, " : ""}layer ${layer}, ${headInWords(head)}${grouped ? "" : `, ${kInWords(s.k)}`}`;
    const one = map({ title: usual });
    switch (s.mode) {
      case "heads":
        return every("attention");
      case "groups":
        return every("groups");
      case "ks":
        return model.ks.map((k) => map({ k, title: who + kInWords(k) }));
      case "pair":
        return [s.k, s.other_k].map((k) => map({ k, title: who + kInWords(k) }));
      case "cost":
        return [one, map({ kind: "cost", title: `${who}extra bits if a block is hidden` })];
      case "decoding":
        return [map({ kind: "decoding", title: model.name })];
      default:
        return grouped && model.cross && s.mode === "head"
          ? [one, map({ kind: "groups", title: `${who}cross mixer, layer ${layer}, ${headInWords(head)}` })]
          : [one];
    }
  });
}

/** The channel slice and site of a row in a table of groups, at the present place; where the grid ends before, at the
 * place before. */
export function siteOfGroup({ counts: [, down, right], order }, meta, { row, column }, group) {
  const [slice, i, j] = order[group];
  const within = (at, count, phase, size) => {
    const place = at - (at % count) + phase;
    return place < size ? place : place - count;
  };
  return { row: within(row, down, i, meta.height), column: within(column, right, j, meta.width), slice };
}

/** The nearest site whose bits depend on context. */
export function nearestPredicted(meta, steps, { row, column }) {
  let [best, least] = [null, Infinity];
  for (let site = 0; site < steps.length; site++) {
    const [r, c] = [Math.floor(site / meta.width), site % meta.width];
    const distance = Math.abs(r - row) + Math.abs(c - column);
    if (steps[site] && distance < least) [best, least] = [{ row: r, column: c }, distance];
  }
  return best;
}
