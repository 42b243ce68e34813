// The explorer's words: names of modes and parts, captions, sentences. No drawing, no state.

export const MEAN = -1; // as head: the mean over all heads
export const DENSE = 0; // as k: dense attention

/** Modes in the order of their buttons: name, what it shows. */
export const MODES = {
  head: [
    "One head",
    "Pink: the known blocks that one attention head looks at to predict the orange one. All heads together decide how many bits it costs.",
  ],
  heads: ["All heads", "Every head of the layer, and their mean, last. Each map has its own scale."],
  ks: [
    "Several k",
    "The same head when only the k best-matching positions may take part. The model was trained with its own k alone.",
  ],
  pair: ["Two k", "The same head with two values of k. Each map has its own scale."],
  groups: [
    "All cross mixers",
    "How much each group looks at the groups before it, at this place, in every head of the cross mixer. Click a row to choose its group.",
  ],
  cost: [
    "Attention and cost",
    "First map: attention. Second map: how many bits more the orange block costs when another block is hidden from it alone, in all layers and heads.",
  ],
  calculation: ["One calculation", "Every number between the scores of one head and the bits of one channel."],
  decoding: [
    "Decoding",
    "What the decoder knows as the bytes arrive: first the side file, then block by block. Blocks that are not there yet are shown as they are expected without context.",
  ],
};

export const BACKDROPS = ["photograph", "decoded picture", "bits spent", "bits saved by context"];

export const TERMS = {
  block: "A latent: a list of integers that stands for one block of 16 x 16 pixels.",
  layer: "The transformer has several layers, one after the other.",
  head: "In each layer several heads look at different things.",
  k: "Only the k blocks with the highest scores are used.",
  other_k: "The k of the map on the right.",
  slice: "GroupedMixer codes the channels of a block in slices.",
  channel: "One of the integers of the block.",
  hyperprior: "A small side file about the whole picture, from which every block is predicted roughly.",
  context: "The blocks that the decoder already knows.",
};

export const headInWords = (head) => (head === MEAN ? "mean over heads" : `head ${head}`);
export const kInWords = (k) => (k === DENSE ? "dense" : `k = ${k}`);
export const escape = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return value.toFixed(Math.abs(value) >= 1 ? 1 : 2);
}

export const percent = (share) =>
  share === 0 ? "0%" : share < 0.0001 ? "<0.01%" : share >= 0.0995 ? `${(100 * share).toFixed(0)}%` : `${(100 * share).toPrecision(2)}%`;

/** What `alone` is measured with: a trained model, or this one without its context. */
export const aloneInWords = (model) =>
  model.reference ? "a second model, trained without context," : "this model with its context switched off";

/** When a query is coded, and what it may look at. */
export function whenInWords(model, query, step) {
  if (model.kind === "parallel")
    return step ? "Second pass: it sees all blocks of the first." : "First pass: it is coded without context.";
  if (model.kind === "serial")
    return query ? "It sees all blocks before it." : "The first block: nothing is decoded yet.";
  const before = ["no group", "group 0"][step] ?? `groups 0 to ${step - 1}`;
  return `Channel slice ${query % model.slices} is group ${step} (of 0 to ${model.order.length - 1}) and sees ${before}.`;
}

const KINDS = {
  parallel:
    "decodes in <b>two passes</b>, like the two colours of a chessboard. The first pass is predicted without context. " +
    "The second sees all of the first.",
  serial:
    "decodes <b>one block after the other</b>, row by row. The attention shown is that of the block just before " +
    "(blue frame), which predicts the chosen one.",
  grouped:
    "is a GroupedMixer. It decodes <b>group after group</b>: the channels are cut into slices, the blocks into " +
    "interleaved phases. The <b>inner mixer</b> looks around inside a group, the <b>cross mixer</b> looks at earlier " +
    "groups at its own place. The blue frame is the block whose token predicts the chosen one.",
};

/** The text below the picture. */
export function about(meta) {
  const models = meta.models
    .map((m) => `<p>${meta.models.length > 1 ? `The model ${escape(m.name)}` : "This model"} ${KINDS[m.kind]}</p>`)
    .join("");
  const sources = meta.models.some(({ hyperprior }) => hyperprior)
    ? "It has two sources: a small side file about the whole picture (the <b>hyperprior</b>), and"
    : "It predicts them from";
  return (
    `<p>A learned codec turns the picture into blocks of integers and stores them in few bits, ` +
    `because it can <b>predict</b> them. ${sources} the blocks that the decoder already knows (the <b>context</b>). ` +
    `A transformer reads the context. Its <b>attention</b> says how much each known block counts in the prediction.</p>${models}` +
    `<p>Keys: arrow keys move the chosen block after a click on the picture. ` +
    `Two fingers, or Ctrl and the wheel, zoom; dragging moves the enlarged picture.</p>`
  );
}

/** One line on the selection, for the reader of the picture and for screen readers. */
export function caption(meta, s, shown) {
  const where = `Block in row ${s.row}, column ${s.column}${s.padding ? ", in the padding outside of the picture" : ""}.`;
  // Of several models that do not all have such a layer and head, each names those that it shows.
  const shared = meta.models.every((m) => s.layer < m.layers && s.head < m.heads);
  const placed = (m) => {
    const layer = `Layer ${Math.min(s.layer, m.layers - 1)}`, head = headInWords(Math.min(s.head, m.heads - 1));
    const what = { heads: `${layer}, every head`, groups: `${layer}, every cross mixer`, ks: `${layer}, ${head}, every k` };
    return what[s.mode] ?? `${layer}, ${head}`;
  };
  const grouped = meta.models.every((m) => m.kind === "grouped");
  const k =
    grouped || s.mode === "ks"
      ? ""
      : s.mode === "pair"
        ? `, ${kInWords(s.k)} beside ${kInWords(s.other_k)}`
        : `, ${kInWords(s.k)}`;
  const each = shown.map(({ model, query, step, facts }) => {
    const name = meta.models.length > 1 ? `${model.name}: ` : "";
    const own = shared || s.mode === "decoding" ? "" : `${placed(model)}. `;
    return `${name}${own}${whenInWords(model, query, step)} ${bitsInWords(model, facts, step)}`;
  });
  const head = shared ? `${placed(meta.models[0])}${k}.` : k && `${k.slice(2)}.`;
  return `${where} ${s.mode === "decoding" ? "" : head} ${each.join(" ")}`
    .replace(/ +/g, " ")
    .trim();
}

function bitsInWords(model, facts, step) {
  if (!facts) return "";
  if (facts.alone === null || facts.alone === undefined || (model.kind === "parallel" && !step))
    return `${number(facts.bits)} bits.`;
  return `${number(facts.bits)} bits; ${aloneInWords(model).replace(/,$/, "")}: ${number(facts.alone)} bits.`;
}
