// The explorer: puts a source's answers on the screen and turns clicks, keys and sliders into selections.
//
// A source answers questions about one picture: Python (widget.js), a page's stored rows (stored.js), or the model
// itself (live.js). Sites are numbers in raster order, site = row * width + column; a query is site * slices + slice.
//
//   meta         {height, width: of the latent grid; inside: [left, top, width, height] of the picture in the padded one;
//                picture: URL; costs, calculation, whatif: whether it can answer that; models: [{name, kind, layers, heads,
//                slices, own_k, ks, radius, counts, order, cross, channel_groups, reference, z_bits,
//                steps, origins: of every query its step of the coder, and the site whose token predicts it}]}
//   overview(model)              {bits, alone: of every query, or alone null}
//   rows(model, query, k, change)  {probs [layers * heads * n], facts: {bits, alone, groups, slice}}
//   costs(model, query, k)       {positions, bits, rho [layers * (heads + 1)]}
//   cross(model, query)          {probs [layers * heads * G * G]}
//   calculation(model, query, k, change, layer, head, channel)   see numbers.js
//   picture(model, name)         URL or null; name: "reconstruction", or "guess": every latent at its mean without context
//   held(mode, k)                sites that can be answered, or null for all
//   begin                        the selection to begin with; chosen(selection), keep(still), listen(adopt): optional
import { Arrival } from "./decoding.js";
import { bitsMap, drawDecoding, drawGroups, drawMap, largest, ofHead } from "./drawing.js";
import { addControls, figureOf, showControls } from "./controls.js";
import { fromHash, keepInAddress } from "./keeping.js";
import { calculation, channelTable, legend, scatter, verdict, wholePicture } from "./numbers.js";
import { asCanvas } from "./sheet.js";
import { changeOf, isPadding, mapsOf, queryOf, settled } from "./selection.js";
import { DENSE, MEAN, MODES, about, caption, escape, kInWords, number, percent } from "./words.js";
import { Zoom } from "./zoom.js";

const HTML = `<div class="ef-explorer" role="region" aria-label="attention explorer">
<div class="ef-bar"><span class="ef-modes" role="group" aria-label="what to show"></span><button type="button" class="ef-tour">Tour</button>
<details class="ef-keep"><summary>Save, share</summary><div>
<button type="button" data-keep="png">Picture (PNG)</button><button type="button" data-keep="svg">Drawing (SVG)</button>
<button type="button" data-keep="csv">Table (CSV)</button><button type="button" data-keep="python">Copy as Python</button><button type="button" data-keep="link">Copy link</button></div></details></div>
<div class="ef-bar ef-choices"></div><p class="ef-note"></p><div class="ef-stop" hidden></div><p class="ef-trouble" role="alert" hidden></p>
<div class="ef-body"><div class="ef-main"><div class="ef-panels"></div>
<div class="ef-bar ef-under"><label>background <input type="range" class="ef-backdrop" min="0" max="3" step="0.05" aria-label="background"><output></output></label>
<label>strength <input type="range" class="ef-overlay" min="0" max="1" step="0.05" aria-label="strength of the overlay"></label>
<label class="ef-check"><input type="checkbox" class="ef-dim"> darken what is not decoded yet</label>
<span class="ef-zoom"><button type="button" data-zoom="0.5" aria-label="smaller">−</button><button type="button" data-zoom="2" aria-label="larger">+</button></span>
<span class="ef-play" hidden><button type="button">Play</button><input type="range" class="ef-part" min="0" max="1" step="0.002" aria-label="bytes that have arrived"></span></div>
<div class="ef-bar ef-whatif" hidden><b>What if</b><label class="ef-check"><input type="checkbox" class="ef-head-off"> this head is switched off</label>
<label class="ef-check"><input type="checkbox" class="ef-no-position"> it ignores positions</label><label class="ef-check"><input type="checkbox" class="ef-hiding"> a click hides a block from all others</label><button type="button" class="ef-as-it-was">Reset</button></div>
<div class="ef-caption" aria-live="polite"></div></div>
<aside class="ef-side"><div class="ef-costs"></div><div class="ef-whole-picture"></div><div class="ef-legend"></div><div class="ef-more"></div></aside></div>
<details class="ef-about"><summary>What is shown here</summary><div></div></details><div class="ef-tip" hidden></div></div>`;

/** Puts an explorer into a place of the page, instead of what is there.  ->  the Explorer */
export function mount(place, source) {
  const root = document.createElement("div"); // its own, so that one that is replaced is no longer connected
  root.innerHTML = HTML;
  place.replaceChildren(root);
  const explorer = new Explorer(root, source);
  explorer.choose({ ...source.begin, ...(source.hash ? fromHash(location.hash) : {}) });
  return explorer;
}

class Explorer {
  constructor(root, source) {
    Object.assign(this, { root, source, meta: source.meta, zoom: new Zoom(), pictures: new Map(), answers: new Map(), overviews: [], latest: 0, maps: [] });
    this.find = (name) => root.querySelector(name);
    this.find(".ef-explorer").explorer = this; // for whoever looks from outside
    this.find(".ef-about div").innerHTML = about(this.meta);
    this.when = this.meta.models.map(({ steps, slices }) => Float64Array.from({ length: steps.length / slices }, (_, i) => Math.min(...steps.slice(i * slices, (i + 1) * slices))));
    addControls(this);
    source.listen?.((selection) => this.adopt(selection));
    if (source.hash) addEventListener("hashchange", () => root.isConnected && this.adopt(fromHash(location.hash)));
  }

  // ---- selection ----

  /** Changes parts of the selection and shows what belongs to it. */
  choose(parts) {
    const before = this.selection;
    this.selection = settled(this.meta, parts, { ...before, ...this.place });
    const { row, column } = this.selection;
    if (!before || "row" in parts || "column" in parts) this.place = { row, column }; // where a view that holds less came from
    this.snap(before);
    if (JSON.stringify(before) !== JSON.stringify(this.selection)) return this.refresh();
  }

  /** Chooses what came from outside; where that changes nothing, what it became goes back. */
  adopt(parts) {
    this.choose(parts) ?? (this.shownNow && this.keep(this.shownNow));
  }

  /** Where the source holds only some sites, takes the nearest one, in the direction of a step. */
  snap(before) {
    const s = this.selection;
    const held = this.source.held?.(s.mode, s.mode === "pair" ? [s.k, s.other_k] : [s.k]);
    if (!held || held.includes(s.row * this.meta.width + s.column)) return;
    const along = (row, column) => !before || ((row - before.row) * (s.row - before.row) >= 0 && (column - before.column) * (s.column - before.column) >= 0 && (row !== before.row || column !== before.column));
    const places = held.map((site) => [Math.floor(site / this.meta.width), site % this.meta.width]);
    const ahead = places.filter(([row, column]) => along(row, column));
    const distance = ([row, column]) => Math.abs(row - s.row) + Math.abs(column - s.column);
    [s.row, s.column] = (ahead.length ? ahead : places).reduce((a, b) => (distance(b) < distance(a) ? b : a));
  }

  // ---- answers ----

  /** Asks once, remembers. */
  ask(question, ...args) {
    const key = JSON.stringify([question, ...args]);
    if (!this.answers.has(key)) {
      if (this.answers.size > 200) this.answers.delete(this.answers.keys().next().value);
      this.answers.set(key, this.source[question](...args).catch((error) => { this.answers.delete(key); throw error; }));
    }
    return this.answers.get(key);
  }

  async image(url) {
    if (!url) return null;
    if (!this.pictures.has(url)) {
      const image = new Image();
      image.src = url;
      this.pictures.set(url, image.decode().then(() => image));
    }
    return this.pictures.get(url);
  }

  async overview(model) {
    this.overviews[model] ??= await this.ask("overview", model);
    return this.overviews[model];
  }

  /** Everything that the present selection shows. */
  async answer(s) {
    const { meta } = this;
    const change = meta.whatif ? changeOf(s) : null;
    const shown = await Promise.all(meta.models.map(async (model, number) => {
      const query = queryOf(meta, model, s);
      const ks = s.mode === "pair" ? [s.k, s.other_k] : [s.k];
      const asked = (what) => Promise.all(ks.map((k) => this.ask("rows", number, query, model.kind === "grouped" ? DENSE : k, what)));
      const [rows, before] = await Promise.all([asked(change), change ? asked(null) : null]);
      return rows.map(({ facts }, i) => ({ model, number, query, step: model.steps[query], facts, before: before?.[i].facts.bits, label: ks.length > 1 ? `${meta.models.length > 1 ? `${model.name}, ` : ""}${kInWords(ks[i])}` : "" }));
    }));
    const flat = shown.flat();
    const maps = await Promise.all(mapsOf(meta, s).map((map) => this.filled(map, s, change)));
    const main = flat[0];
    const { layer, head } = maps[0];
    const c = s.mode === "calculation" && main.step ? await this.ask("calculation", 0, main.query, s.k, change, layer, head, s.channel) : null;
    return { maps, shown: flat, c };
  }

  /** A map with its values and what they mean. */
  async filled(map, s, change) {
    const { meta } = this;
    const model = meta.models[map.model];
    const query = queryOf(meta, model, s);
    const [step, n, when] = [model.steps[query], meta.height * meta.width, this.when[map.model]];
    const at = (site) => [Math.floor(site / meta.width), site % meta.width];
    const off = change?.off.some(([l, h]) => l === map.layer && h === map.head);
    if (off && map.kind === "attention") map.title += " (switched off: its attention has no effect)";
    Object.assign(map, { hidden: s.hidden, step, query: [s.row, s.column], origin: at(model.origins[query]), radius: change && !change.position ? 0 : model.radius, decoded: (i) => when[i] < step, selected: () => false, values: null });
    if (map.kind === "decoding") return map;
    if (map.kind === "groups") {
      const { probs } = await this.ask("cross", map.model, query);
      return Object.assign(map, { values: ofHead(probs, model.heads, model.order.length ** 2, map.layer, map.head) });
    }
    const silent = model.kind === "parallel" && !step;
    if (silent && !s.gathers) return Object.assign(map, { silent, radius: 0 });
    if (silent) map.decoded = () => true;
    const rows = await this.ask("rows", map.model, query, map.k, change);
    const probs = ofHead(rows.probs, model.heads, n, map.layer, map.head);
    if (model.kind !== "grouped") map.title += s.mode === "ks" || s.mode === "pair" ? `: ${number(rows.facts.bits)} bits` : "";
    if (map.kind === "cost") {
      const { positions, bits, rho } = await this.ask("costs", map.model, query, map.k);
      const [values, hidden] = [new Float32Array(n), new Set(positions)];
      positions.forEach((p, i) => (values[p] = bits[i]));
      const place = map.layer * (model.heads + 1) + (map.head === MEAN ? model.heads : map.head);
      const attention = [...positions].map((p) => probs[p]);
      Object.assign(map, { values, selected: (i) => hidden.has(i), scatter: { attention, bits: [...bits], rho: rho[place] } });
    } else {
      Object.assign(map, { values: probs, selected: (i) => map.head !== MEAN && map.k !== DENSE && probs[i] > 0, silent });
    }
    return Object.assign(map, { most: largest(map.values) });
  }

  // ---- showing ----

  async refresh() {
    const turn = ++this.latest;
    const s = { ...this.selection };
    try {
      const [{ maps, shown, c }, backdrops] = await Promise.all([this.answer(s), this.backdrops(s)]);
      if (turn !== this.latest) return; // something else was chosen meanwhile
      Object.assign(this, { maps, shown, backdropsNow: backdrops });
      this.trouble("");
      this.find(".ef-tip").hidden = true; // its words are those of the selection before
      await this.draw(s);
      this.say(s, c);
      showControls(this, s);
      this.shownNow = s;
      this.keep(s);
    } catch (error) {
      if (turn === this.latest) this.trouble(error.message);
    }
  }

  trouble(words) {
    const place = this.find(".ef-trouble");
    place.hidden = !words;
    place.textContent = words;
  }

  /** The pictures that the background slider passes; those it is not near are not asked for. */
  async backdrops(s) {
    const near = (place) => Math.abs(s.backdrop - place) < 1;
    const one = async (place) => {
      if (!near(place)) return null;
      if (place === 0) return this.image(this.meta.picture);
      if (place === 1) return this.image(await this.ask("picture", 0, "reconstruction").then(({ url }) => url));
      const { bits, alone } = await this.overview(0);
      const { steps, kind } = this.meta.models[0];
      const saved = (b, query) => (kind === "parallel" && !steps[query] ? NaN : alone[query] - b);
      const sites = this.perSite(0, place === 2 ? bits : alone && bits.map(saved));
      if (!sites) return null;
      const { canvas, most } = bitsMap(this.meta, place === 2 ? "spent" : "saved", sites);
      this.backdropMost = most;
      return canvas;
    };
    return Promise.all([0, 1, 2, 3].map(one));
  }

  perSite(model, values) {
    const { slices } = this.meta.models[model];
    return values && Float32Array.from({ length: values.length / slices }, (_, i) => values.slice(i * slices, (i + 1) * slices).reduce((a, b) => a + b, 0));
  }

  async draw(s) {
    const { meta, maps } = this;
    const box = this.find(".ef-panels");
    while (box.children.length < maps.length) box.append(figureOf(this, box.children.length));
    while (box.children.length > maps.length) box.lastChild.remove();
    const each = Math.max(...meta.models.map((_, m) => maps.filter((p) => p.model === m).length));
    const beside = maps.length === 2 && maps[0].kind !== "groups" && maps[1].kind === "groups";
    const columns = maps.length <= 4 ? Math.min(2, maps.length) : each <= 4 ? each : 3;
    this.columns = columns;
    box.style.gridTemplateColumns = beside ? "minmax(0, 5fr) minmax(0, 3fr)" : `repeat(${columns}, minmax(0, 1fr))`;
    box.style.setProperty("--ef-aspect", meta.width / meta.height);
    box.style.setProperty("--ef-columns", columns);
    const arrivals = s.mode === "decoding" ? await this.arrivals() : null;
    for (const [i, map] of maps.entries()) {
      const figure = box.children[i];
      const canvas = figure.querySelector("canvas");
      figure.classList.toggle("ef-groups", map.kind === "groups");
      const peak = map.kind === "attention" && map.values && maps.length > 2 ? ` (up to ${percent(map.most)})` : "";
      figure.querySelector("figcaption").textContent = map.title + peak;
      canvas.setAttribute("aria-label", map.title);
      if (map.kind === "groups") drawGroups(canvas, meta.models[map.model].order, map.values, map.step);
      else if (map.kind === "decoding") figure.querySelector("figcaption").textContent += await this.drawArrival(canvas, map, arrivals, s);
      else drawMap(canvas, meta, { ...map, backdrops: this.backdropsNow, position: s.backdrop, overlay: s.overlay, dim: s.dim, large: maps.length < 3 });
    }
  }

  async arrivals() {
    return Promise.all(this.meta.models.map(async (model, i) => new Arrival(model, { ...(await this.overview(i)), steps: model.steps })));
  }

  async drawArrival(canvas, map, arrivals, s) {
    const received = s.part * Math.max(...arrivals.map(({ total }) => total));
    const [guess, decoded] = await Promise.all(["guess", "reconstruction"].map(async (name) => this.image((await this.ask("picture", map.model, name)).url)));
    const arrival = arrivals[map.model];
    const shares = arrival.shares(received, this.meta.height * this.meta.width);
    drawDecoding(canvas, this.meta, { guess: received >= arrival.z_bits ? guess : null, decoded, shares, query: map.query });
    return ` – ${arrivals[map.model].inWords(received)}`;
  }

  say(s, c) {
    const { meta, maps, shown } = this;
    const several = meta.models.length > 1;
    const words = caption(meta, { ...s, padding: isPadding(meta, s) }, several || s.mode === "pair" ? shown.filter(({ model }, i) => shown.findIndex((o) => o.model === model) === i) : shown);
    const held = this.source.held?.(s.mode, s.mode === "pair" ? [s.k, s.other_k] : [s.k]);
    const few = held ? ` This view is stored for ${held.length} of ${meta.height * meta.width} blocks; the nearest is shown.` : "";
    this.words = words;
    this.find(".ef-caption").textContent = this.words;
    const silent = maps.some((one) => one.silent) && !s.gathers;
    const what = silent ? "No attention to show: this block is predicted without context." : s.head === MEAN && s.mode === "head" ? MODES.head[1].replace("one attention head looks at", "all heads of a layer look at, on average,") : MODES[s.mode][1];
    this.find(".ef-note").textContent = `${what} Click another block to choose it.${few}`;
    const focused = this.find(".ef-side :focus")?.className; // it is made anew
    this.find(".ef-costs").innerHTML = shown.map((one) => verdict(one, several, one.label)).join("") + (isPadding(meta, s) ? "<p>It lies in the <b>padding</b>: around the picture its border is repeated, because the model takes only some sizes.</p>" : "");
    if (s.hidden.some((site) => meta.models[0].steps[site])) this.find(".ef-costs").insertAdjacentHTML("beforeend", "<p>A hidden block of the second pass changes nothing: no other block looks at it.</p>");
    this.sayWhole();
    const map = maps.find(({ kind }) => kind !== "groups");
    const alone = maps.filter(({ kind }) => kind === "attention").length < 2;
    const [, , width, height] = meta.inside;
    const padding = width < 16 * meta.width || height < 16 * meta.height;
    const own = map && meta.models[map.model];
    const selected = map && map.values && own.kind !== "grouped" && map.k !== DENSE && (map.head !== MEAN || map.kind === "cost") && `the ${s.mode === "ks" || s.mode === "pair" ? "k" : map.k} blocks with the highest scores; only these are used`;
    this.find(".ef-legend").innerHTML = legend(map && map.values ? { ...map, kind: maps.some(({ kind }) => kind === "cost") ? "cost" : map.kind, most: (maps.find(({ kind }) => kind === "cost") ?? map).most, backdrop: Math.round(s.backdrop), backdropMost: this.backdropMost ?? 0, alone, hidden: s.hidden.length, origin: maps.some((one) => one.kind !== "groups" && one.values && String(one.origin) !== String(one.query)), selected, padding } : { padding, backdrop: Math.round(s.backdrop), backdropMost: this.backdropMost ?? 0 });
    const scatters = maps.filter((m) => m.scatter).map((m) => scatter(m.scatter));
    const opened = s.mode === "calculation" ? calculation(meta, { ...s, layer: map.layer, head: map.head }, c) : "";
    const tables = shown.map((one) => `<details class="ef-channels"><summary>${several || one.label ? escape(one.label || one.model.name) + ": " : ""}Values and predictions by group of channels</summary>${channelTable(one, one.model.order ? [...Array(one.model.slices).keys()].map((i) => one.model.steps[one.query - (one.query % one.model.slices) + i]) : null)}</details>`);
    const open = this.find(".ef-channels")?.open;
    this.find(".ef-more").innerHTML = opened + scatters.join("") + tables.join("");
    if (open) this.root.querySelectorAll(".ef-channels").forEach((details) => (details.open = true));
    for (const gathers of this.root.querySelectorAll(".ef-gathers")) gathers.checked = s.gathers;
    if (focused) this.find(`.${focused}`)?.focus({ preventScroll: true });
  }

  /** What context saves in the whole picture, for models of which that is known. */
  sayWhole() {
    const { models } = this.meta;
    this.find(".ef-whole-picture").innerHTML = models.map((model, i) => (this.overviews[i] ? wholePicture(model, this.overviews[i], models.length > 1) : "<p>Whole picture: …</p>")).join("");
  }

  /** Tells the source and the address what is shown; the overview comes when there is time. */
  keep(s) {
    if (this.source.hash) keepInAddress(s);
    this.source.chosen?.(s);
    clearTimeout(this.later);
    this.later = setTimeout(async () => {
      if (!this.root.isConnected || this.shownNow !== s) return;
      this.source.keep?.({ picture: this.sheet(640, "").toDataURL("image/jpeg", 0.85), caption: this.words });
      if (this.overviews[0]) return;
      await Promise.all(this.meta.models.map((_, i) => this.overview(i))).catch(() => {});
      this.sayWhole();
    }, 600);
  }

  /** What is on the screen: of each map its canvas and title. */
  panels() {
    return [...this.root.querySelectorAll(".ef-panel")].map((figure, i) => ({ canvas: figure.querySelector("canvas"), title: figure.querySelector("figcaption").textContent, map: this.maps[i] }));
  }

  /** What is on the screen with words below, as a canvas; no wider than `most`. */
  sheet(most = Infinity, words = this.words) {
    const whole = asCanvas(this.panels(), this.columns, words);
    if (whole.width <= most) return whole;
    const small = Object.assign(document.createElement("canvas"), { width: most, height: Math.round((whole.height * most) / whole.width) });
    small.getContext("2d").drawImage(whole, 0, 0, small.width, small.height);
    return small;
  }
}
