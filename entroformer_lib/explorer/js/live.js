// A source for the explorer that runs the model in the page, with onnxruntime-web. What each graph takes and gives is
// said in live_graphs.py.

import { bitsOf, probabilities, rankCorrelation } from "./live_numbers.js";
import { canvasOf, drawn, padded } from "./live_pictures.js";

const QUERIES = 128; // at a time
const HELD = 8; // changes whose keys and values are kept
const NOTHING = { hidden: [], off: [], position: true };

// The sessions of a page's graphs, once they are there.
async function sessionsOf({ sessions }, tell) {
  const names = Object.keys(sessions);
  const ready = {};
  for (const [i, name] of names.entries()) {
    await tell("loading the model", i / names.length);
    ready[name] = await sessions[name];
  }
  return ready;
}

// Says what is done now, and lets the browser show it.
const teller = (progress) => async (words, part) => {
  progress?.(words, part);
  await new Promise((done) => setTimeout(done, 10));
};

export class LiveSource {
  // progress: called with (what is done now, the part that is done from 0 to 1).
  static async open(engine, image, progress) {
    const tell = teller(progress);
    const canvas = drawn(image);
    const sessions = await sessionsOf(engine, (words, part) => tell(words, 0.3 * part));
    const source = new LiveSource(engine, sessions);
    await source.#see(canvas, engine.facts, tell);
    await tell("ready", 1);
    return source;
  }

  #ort;
  #sessions;
  #facts;
  #level; // input of all graphs that take the rate
  #grid; // { n, carriers: sites of the first pass, isFirst: [n] }
  #yHat;
  #hyper;
  #channels; // group of each channel
  #reference = null; // means and scales of the trained model without context
  #remembered = new Map(); // change -> keys and values
  #last = Promise.resolve(); // a session answers one question at a time
  #overview;
  #reconstruction; // data URL
  hash = true; // the address of the page names the view

  constructor({ ort, facts }, sessions) {
    [this.#ort, this.#facts, this.#sessions] = [ort, facts, sessions];
    this.#level = facts.level === null ? null : this.#floats([facts.level], [1]);
  }

  // ---- a picture becomes latents ----

  async #see(canvas, facts, tell) {
    const { pixels, width, height, inside } = padded(canvas, facts.downsampling);
    await tell("analysis: pixels to latents", 0.3);
    const { y, z } = await this.#run("analysis", { x: this.#floats(pixels, [1, 3, height, width]) });
    const [rows, columns] = y.dims.slice(2);
    this.#grid = gridOf(rows, columns);
    this.#yHat = this.#floats(
      y.data.map((v) => Math.floor(Math.fround(v + 0.5))),
      y.dims,
    );
    await tell("hyperprior", 0.6);
    const sites = z.dims[2] * z.dims[3];
    const medians = Float32Array.from(facts.medians);
    let zBits = 0;
    const zHat = z.data.map((v, i) => {
      const channel = Math.floor(i / sites);
      const step = Math.floor(Math.fround(Math.fround(v - medians[channel]) + 0.5));
      const costs = facts.z_bits[channel];
      zBits += costs[Math.min(Math.max(step + (costs.length - 1) / 2, 0), costs.length - 1)];
      return step + medians[channel];
    });
    this.#hyper = (await this.#run("hyper_synthesis", { z_hat: this.#floats(zHat, z.dims) })).hyper;
    if (this.#sessions.reference) this.#reference = await this.#run("reference", { y });
    this.#channels = channelGroups(this.#yHat.data, facts.M, this.#grid.n, facts.groups);
    await tell("synthesis: latents to pixels", 0.8);
    const { x_hat } = await this.#run("synthesis", { y_hat: this.#yHat });
    this.#reconstruction = canvasOf(x_hat.data, width, height).toDataURL();
    this.meta = {
      height: rows,
      width: columns,
      inside,
      picture: canvasOf(pixels, width, height).toDataURL(),
      note: canvas.note,
      models: [
        {
          ...facts.model,
          ...this.#grid.said,
          z_bits: zBits,
          hyperprior: true,
          kind: "parallel",
          slices: 1,
          counts: null,
          order: null,
          cross: false,
          channel_groups: this.#channels,
        },
      ],
      costs: true,
      whatif: true,
      calculation: true,
    };
  }

  // The picture with every latent at the mean that is expected without context, as a data URL.
  async #guess() {
    const { n } = this.#grid;
    const { M } = this.#facts;
    const latents = new Float32Array(M * n);
    for (const [, part] of stretches(Uint16Array.from(Array(n).keys()))) {
      const seen = this.#reference
        ? null
        : await this.#look(part, this.#facts.model.own_k, null, ["means_alone", "scales_alone"]);
      part.forEach((query, i) => this.#alone(query, seen, i)[0].forEach((mean, m) => (latents[m * n + query] = mean)));
    }
    const { data, dims } = (await this.#run("synthesis", { y_hat: this.#floats(latents, this.#yHat.dims) })).x_hat;
    return canvasOf(data, dims[3], dims[2]).toDataURL();
  }

  // ---- the interface of a source ----

  async picture(model, name) {
    return { url: name === "guess" ? await this.#guess() : this.#reconstruction };
  }

  // change: the bits after a change are not kept.
  async overview(model, change = null) {
    const bits = () => this.#bits(this.#facts.model.own_k, change ?? NOTHING);
    return change ? bits() : (this.#overview ??= bits());
  }

  async rows(model, query, k, change = null) {
    const seen = await this.#look([query], k, change, ["means", "scales", "means_alone", "scales_alone", "probs"]);
    return { probs: this.#onGrid(seen.probs, 0, [query], 0), facts: this.#factsOf(query, seen) };
  }

  // Hides each position that some head attends to from the query alone.
  async costs(model, query, k) {
    const { n, isFirst } = this.#grid;
    const { layers, heads } = this.#facts.model;
    if (isFirst[query]) {
      const rho = new Float32Array(layers * (heads + 1)).fill(NaN);
      return { positions: new Uint16Array(0), bits: new Float32Array(0), rho };
    }
    const usual = await this.#look([query], k, null, ["means", "scales", "probs"]);
    const rows = this.#onGrid(usual.probs, 0, [query], 0);
    const attended = (site) =>
      site !== query && Array.from({ length: layers * heads }, (_, i) => i * n + site).some((i) => rows[i] > 0);
    const positions = Uint16Array.from(Array(n).keys()).filter(attended);
    const before = this.#sum(query, usual, 0);
    const bits = new Float32Array(positions.length);
    for (const [start, part] of stretches(positions)) {
      const seen = await this.#look(
        part.map(() => query),
        k,
        null,
        ["means", "scales"],
        part,
      );
      part.forEach((_, i) => (bits[start + i] = this.#sum(query, seen, i) - before));
    }
    return { positions, bits, rho: correlations(rows, positions, bits, layers, heads, n) };
  }

  async calculation(model, query, k, change, layer, head, channel) {
    const parts = ["content", "position", "scores", "probs"];
    const seen = await this.#look([query], k, change, ["means", "scales", ...parts]);
    const { n } = this.#grid;
    const row = (layer * this.#facts.model.heads + head) * n;
    const found = {};
    for (const part of parts) found[part] = this.#onGrid(seen[part], 0, [query], NaN).slice(row, row + n);
    for (let j = 0; j < n; j++) {
      if (found.scores[j] === -Infinity) for (const part of parts) found[part][j] = NaN; // hidden from this query
    }
    const scores = found.scores
      .filter((s) => !Number.isNaN(s))
      .sort()
      .reverse(); // typed arrays sort as numbers
    const least = scores[Math.min(k || scores.length, scores.length) - 1];
    const value = this.#yHat.data[channel * n + query];
    const [mean, scale] = [seen.means.data[channel], seen.scales.data[channel]];
    return {
      ...found,
      selected: Uint8Array.from(found.scores, (score) => (score >= least ? 1 : 0)),
      value,
      mean,
      scale,
      bits: bitsOf(value, mean, scale, this.#facts.likelihood_floor),
      ...probabilities(value, mean, scale),
    };
  }

  // ---- how ----

  #floats(data, dims) {
    return new this.#ort.Tensor("float32", data instanceof Float32Array ? data : Float32Array.from(data), dims);
  }

  #integers(data) {
    return new this.#ort.Tensor("int64", BigInt64Array.from(data, BigInt), [data.length]);
  }

  #run(name, inputs, outputs) {
    const session = this.#sessions[name];
    const given = session.inputNames.includes("level") ? { ...inputs, level: this.#level } : inputs;
    const answer = this.#last.then(() => session.run(given, outputs ?? session.outputNames));
    this.#last = answer.catch(() => {});
    return answer;
  }

  #changed(k, change) {
    const { layers, heads } = this.#facts.model;
    const on = new Float32Array(layers * heads).fill(1);
    for (const [layer, head] of change.off) on[layer * heads + head] = 0;
    return {
      y_hat: this.#yHat,
      k: this.#integers([k]),
      head_on: this.#floats(on, [layers, heads]),
      position_on: this.#floats([change.position ? 1 : 0], [1]),
    };
  }

  // 0 for tokens of the first pass that are hidden.
  #keep(change) {
    return Float32Array.from(this.#grid.carriers, (site) => (change.hidden.includes(site) ? 0 : 1));
  }

  // Keys and values of the first pass, computed once for each k and change.
  #memory(k, change) {
    const name = JSON.stringify([k, change.hidden, change.off, change.position]);
    if (!this.#remembered.has(name)) {
      const keep = this.#keep(change);
      const answer = this.#run("remember", { ...this.#changed(k, change), keep: this.#floats(keep, [keep.length]) });
      this.#remembered.set(name, answer);
      const [oldest] = this.#remembered.keys();
      if (this.#remembered.size > HELD) this.#remembered.delete(oldest);
    }
    return this.#remembered.get(name);
  }

  // What some queries see and predict; hide: a site for each that it alone may not see.
  async #look(queries, k, change, outputs, hide) {
    const { carriers } = this.#grid;
    const said = change ?? NOTHING;
    const keep = this.#keep(said);
    const visible = new Float32Array(queries.length * carriers.length);
    queries.forEach((_, i) => visible.set(keep, i * carriers.length));
    hide?.forEach((site, i) => (visible[i * carriers.length + carriers.indexOf(site)] = 0));
    const inputs = {
      ...this.#changed(k, said),
      ...(await this.#memory(k, said)),
      hyper: this.#hyper,
      sites: this.#integers(queries),
      visible: this.#floats(visible, [queries.length, carriers.length]),
    };
    return this.#run("look", inputs, outputs);
  }

  // Bits of all latents with context and without.
  async #bits(k, change) {
    const { n } = this.#grid;
    const [bits, alone] = [new Float32Array(n), new Float32Array(n)];
    for (const [, part] of stretches(Uint16Array.from(Array(n).keys()))) {
      await new Promise((done) => setTimeout(done, 0)); // clicks in between are answered
      const seen = await this.#look(part, k, change, ["means", "scales", "means_alone", "scales_alone"]);
      part.forEach((query, i) => {
        bits[query] = this.#sum(query, seen, i);
        alone[query] = this.#perChannel(query, this.#alone(query, seen, i)).reduce((a, b) => a + b);
      });
    }
    return { bits, alone, ...this.#grid.said };
  }

  // Means and scales [M] of one query, in row i of what was seen.
  #said(seen, i, ending = "") {
    const part = (name) => seen[name + ending].data.subarray(i * this.#facts.M, (i + 1) * this.#facts.M);
    return [part("means"), part("scales")];
  }

  #alone(query, seen, i) {
    return this.#reference ? this.#said(this.#reference, query) : this.#said(seen, i, "_alone");
  }

  #values(query) {
    return Float32Array.from({ length: this.#facts.M }, (_, m) => this.#yHat.data[m * this.#grid.n + query]);
  }

  #perChannel(query, [means, scales]) {
    const floor = this.#facts.likelihood_floor;
    return Float64Array.from(this.#values(query), (v, m) => bitsOf(v, means[m], scales[m], floor));
  }

  #sum(query, seen, i) {
    return this.#perChannel(query, this.#said(seen, i)).reduce((a, b) => a + b);
  }

  #factsOf(query, seen) {
    const [said, without] = [this.#said(seen, 0), this.#alone(query, seen, 0)];
    const [bits, alone] = [this.#perChannel(query, said), this.#perChannel(query, without)];
    const values = this.#values(query);
    const total = (numbers, group) => group.reduce((sum, m) => sum + numbers[m], 0);
    const size = (numbers, group) => Math.sqrt(group.reduce((sum, m) => sum + numbers[m] ** 2, 0) / group.length);
    const groups = this.#channels.map((group) => ({
      channels: group.length,
      value: size(values, group),
      mean: size(said[0], group),
      scale: size(said[1], group),
      bits: total(bits, group),
      alone: total(alone, group),
    }));
    return { bits: bits.reduce((a, b) => a + b), alone: alone.reduce((a, b) => a + b), groups };
  }

  // Columns of row i of [layers, heads, q, c + 1] at their sites: [layers * heads * n].
  #onGrid(tensor, i, queries, empty) {
    const [layers, heads, count, columns] = tensor.dims;
    const { n, carriers, isFirst } = this.#grid;
    const found = new Float32Array(layers * heads * n).fill(empty);
    for (let row = 0; row < layers * heads; row++) {
      const from = (row * count + i) * columns;
      carriers.forEach((site, j) => (found[row * n + site] = tensor.data[from + j]));
      if (!isFirst[queries[i]]) found[row * n + queries[i]] = tensor.data[from + columns - 1];
    }
    return found;
  }
}

// ---- the grid ----

// Latents with row + column odd are coded in the first pass, and what their tokens carry is all the context there is.
function gridOf(rows, columns) {
  const n = rows * columns;
  const isFirst = Array.from({ length: n }, (_, site) => (Math.floor(site / columns) + (site % columns)) % 2 === 1);
  const sites = Array.from(Array(n).keys());
  const said = { steps: Uint16Array.from(isFirst, (first) => (first ? 0 : 1)), origins: Uint16Array.from(sites) };
  return { n, isFirst, said, carriers: sites.filter((site) => isFirst[site]) };
}

// Channels by their mean size, the largest first, in `count` groups as equal as can be.
function channelGroups(values, M, n, count) {
  const size = Array.from({ length: M }, (_, m) =>
    values.subarray(m * n, (m + 1) * n).reduce((s, v) => s + Math.abs(v), 0),
  );
  const order = Array.from(size.keys()).sort((a, b) => size[b] - size[a] || a - b);
  const [small, more] = [Math.floor(M / count), M % count];
  const ends = Array.from({ length: count + 1 }, (_, i) => i * small + Math.min(i, more));
  const groups = ends.slice(1).map((end, i) => order.slice(ends[i], end).sort((a, b) => a - b));
  return groups.filter((group) => group.length);
}

function* stretches(items) {
  for (let start = 0; start < items.length; start += QUERIES) {
    yield [start, Array.from(items.subarray(start, start + QUERIES))];
  }
}

// Of every layer and head, the mean over heads last: does attention rank positions as their absence costs?
function correlations(rows, positions, bits, layers, heads, n) {
  const found = [];
  for (let layer = 0; layer < layers; layer++) {
    const each = Array.from({ length: heads }, (_, head) =>
      Float64Array.from(positions, (site) => rows[(layer * heads + head) * n + site]),
    );
    const mean = Float64Array.from(positions, (_, i) => each.reduce((sum, row) => sum + row[i], 0) / heads);
    for (const row of [...each, mean]) found.push(rankCorrelation(row, bits));
  }
  return Float32Array.from(found);
}
