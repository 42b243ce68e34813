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
//   picture(model, name)         {url}, or null in its place; name: "reconstruction", or "guess": every latent at its mean without context
//   held(mode, k)                sites that can be answered, or null for all
//   begin                        the selection to begin with; chosen(selection), keep(still), listen(adopt): optional
import { Answers } from "./answers.js";
import { addControls, figureOf, showControls } from "./controls.js";
import { drawDecoding, drawGroups, drawMap } from "./drawing.js";
import { fromHash, keepInAddress } from "./keeping.js";
import { calculation, channelTable, legend, scatter, verdict, wholePicture } from "./numbers.js";
import { isPadding, settled } from "./selection.js";
import { asCanvas } from "./sheet.js";
import { DENSE, MEAN, MODES, about, caption, escape, percent } from "./words.js";
import { Zoom } from "./zoom.js";

const button = (attributes, words) => `<button type="button" ${attributes}>${words}</button>`;
const check = (name, words) => `<label class="ef-check"><input type="checkbox" class="${name}"> ${words}</label>`;
const range = (name, most, step, words) =>
  `<input type="range" class="${name}" min="0" max="${most}" step="${step}" aria-label="${words}">`;

const HTML = `
<div class="ef-explorer" role="region" aria-label="attention explorer">
  <div class="ef-bar">
    <span class="ef-modes" role="group" aria-label="what to show"></span>
    ${button('class="ef-tour"', "Tour")}
    <details class="ef-keep"><summary>Save, share</summary><div>
      ${button('data-keep="png"', "Picture (PNG)")}
      ${button('data-keep="svg"', "Drawing (SVG)")}
      ${button('data-keep="csv"', "Table (CSV)")}
      ${button('data-keep="python"', "Copy as Python")}
      ${button('data-keep="link"', "Copy link")}
    </div></details>
  </div>
  <div class="ef-bar ef-choices"></div>
  <p class="ef-note"></p>
  <div class="ef-stop" hidden></div>
  <p class="ef-trouble" role="alert" hidden></p>
  <div class="ef-body">
    <div class="ef-main">
      <div class="ef-panels"></div>
      <div class="ef-bar ef-under">
        <label>background ${range("ef-backdrop", 3, 0.05, "background")}<output></output></label>
        <label>strength ${range("ef-overlay", 1, 0.05, "strength of the overlay")}</label>
        ${check("ef-dim", "darken what is not decoded yet")}
        <span class="ef-zoom">
          ${button('data-zoom="0.5" aria-label="smaller"', "−")}${button('data-zoom="2" aria-label="larger"', "+")}
        </span>
        <span class="ef-play" hidden>
          ${button("", "Play")}${range("ef-part", 1, 0.002, "bytes that have arrived")}
        </span>
      </div>
      <div class="ef-bar ef-whatif" hidden>
        <b>What if</b>
        ${check("ef-head-off", "this head is switched off")}
        ${check("ef-no-position", "it ignores positions")}
        ${check("ef-hiding", "a click hides a block from all others")}
        ${button('class="ef-as-it-was"', "Reset")}
      </div>
      <div class="ef-caption" aria-live="polite"></div>
    </div>
    <aside class="ef-side">
      <div class="ef-costs"></div>
      <div class="ef-whole-picture"></div>
      <div class="ef-legend"></div>
      <div class="ef-more"></div>
    </aside>
  </div>
  <details class="ef-about"><summary>What is shown here</summary><div></div></details>
  <div class="ef-tip" hidden></div>
</div>`;

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
    Object.assign(this, {
      root,
      source,
      meta: source.meta,
      answers: new Answers(source),
      zoom: new Zoom(),
      latest: 0,
      maps: [],
    });
    this.find = (name) => root.querySelector(name);
    this.find(".ef-explorer").explorer = this; // for whoever looks from outside
    this.find(".ef-about div").innerHTML = about(this.meta);
    addControls(this);
    source.listen?.((selection) => this.adopt(selection));
    if (source.hash) this.followAddress();
  }

  /** Adopts what the address says when it changes, until another explorer has taken this one's place. */
  followAddress() {
    const follow = () => {
      const here = this.root.isConnected && this.find(".ef-explorer")?.explorer === this;
      if (here) this.adopt(fromHash(location.hash));
      else removeEventListener("hashchange", follow);
    };
    addEventListener("hashchange", follow);
  }

  // ---- selection ----

  /** Changes parts of the selection and shows what belongs to it. */
  choose(parts) {
    const before = this.selection;
    this.selection = settled(this.meta, parts, { ...before, ...this.place });
    const { row, column } = this.selection;
    if (!before || "row" in parts || "column" in parts) this.place = { row, column }; // where a view that holds less came from
    this.snap("row" in parts || "column" in parts ? before : null);
    if (JSON.stringify(before) !== JSON.stringify(this.selection)) return this.refresh();
    showControls(this, this.selection); // a slider may stand where nothing is
  }

  /** Chooses what came from outside; where that changes nothing, what it became goes back. */
  adopt(parts) {
    this.choose(parts) ?? (this.shownNow && this.keep(this.shownNow));
  }

  /** The sites that the source can show, where that is not all. */
  held(s) {
    const own = s.mode === "decoding" ? this.meta.models[0].own_k : s.k;
    return this.source.held?.(s.mode, s.mode === "pair" ? [s.k, s.other_k] : [own]);
  }

  /** Where the source holds only some sites, takes the nearest one, in the direction of a step.  before: the step's start */
  snap(before) {
    const s = this.selection;
    const held = this.held(s);
    if (!held || held.includes(s.row * this.meta.width + s.column)) return;
    const along = (row, column) =>
      !before ||
      ((row - before.row) * (s.row - before.row) >= 0 &&
        (column - before.column) * (s.column - before.column) >= 0 &&
        (row !== before.row || column !== before.column));
    const places = held.map((site) => [Math.floor(site / this.meta.width), site % this.meta.width]);
    const ahead = places.filter(([row, column]) => along(row, column));
    const distance = ([row, column]) => Math.abs(row - s.row) + Math.abs(column - s.column);
    [s.row, s.column] = (ahead.length ? ahead : places).reduce((a, b) => (distance(b) < distance(a) ? b : a));
  }

  // ---- showing ----

  async refresh() {
    const turn = ++this.latest;
    const s = { ...this.selection };
    try {
      const [{ maps, shown, c }, backdrops, arrivals] = await Promise.all([
        this.answers.of(s),
        this.answers.backdrops(s),
        s.mode === "decoding" ? this.answers.arrivals() : null,
      ]);
      if (turn !== this.latest) return; // something else was chosen meanwhile; from here on nothing is waited for
      this.backdropMost = backdrops[Math.round(s.backdrop)]?.most ?? 0;
      Object.assign(this, { maps, shown, backdropsNow: backdrops.map((one) => one && one.canvas) });
      this.trouble("");
      this.find(".ef-tip").hidden = true; // its words are those of the selection before
      this.draw(s, arrivals);
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

  draw(s, arrivals) {
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
    for (const [i, map] of maps.entries()) {
      const figure = box.children[i];
      const canvas = figure.querySelector("canvas");
      figure.classList.toggle("ef-groups", map.kind === "groups");
      const peak = map.kind === "attention" && map.values && maps.length > 2 ? ` (up to ${percent(map.most)})` : "";
      figure.querySelector("figcaption").textContent = map.title + peak;
      canvas.setAttribute("aria-label", map.title);
      if (map.kind === "groups") drawGroups(canvas, meta.models[map.model].order, map.values, map.step);
      else if (map.kind === "decoding")
        figure.querySelector("figcaption").textContent += this.drawArrival(canvas, map, arrivals, s);
      else
        drawMap(canvas, meta, { ...map, ...this.view(s) });
    }
  }

  /** How maps are drawn. */
  view(s) {
    const { backdrop: position, overlay, dim } = s;
    return { backdrops: this.backdropsNow, position, overlay, dim, large: this.maps.length < 3 };
  }

  drawArrival(canvas, map, arrivals, s) {
    const received = s.part * Math.max(...arrivals.map(({ arrival }) => arrival.total));
    const { arrival, guess, decoded } = arrivals[map.model];
    const shares = arrival.shares(received, this.meta.height * this.meta.width);
    drawDecoding(canvas, this.meta, {
      guess: received >= arrival.z_bits ? guess : null,
      decoded,
      shares,
      query: map.query,
    });
    return ` – ${arrival.inWords(received)}`;
  }

  /** All words of the page. c: the opened calculation, if it is shown */
  say(s, c) {
    const several = this.meta.models.length > 1;
    this.sayWhere(s, several);
    const focused = this.find(".ef-side :focus")?.className; // the panel beside is made anew
    this.find(".ef-costs").innerHTML = this.costsInWords(s, several);
    this.sayWhole();
    this.find(".ef-legend").innerHTML = legend(this.shownInLegend(s));
    this.sayMore(s, c, several);
    for (const gathers of this.root.querySelectorAll(".ef-gathers")) gathers.checked = s.gathers;
    if (focused) this.find(`.${focused}`)?.focus({ preventScroll: true });
  }

  /** The caption below the maps, and the note above them. */
  sayWhere(s, several) {
    const { meta, maps, shown } = this;
    const once = shown.filter(({ model }, i) => shown.findIndex((other) => other.model === model) === i);
    const padding = isPadding(meta, s);
    this.words = caption(meta, { ...s, padding }, several || s.mode === "pair" ? once : shown);
    this.find(".ef-caption").textContent = this.words;
    const held = this.held(s);
    const few = `This view is stored for ${held?.length} of ${meta.height * meta.width} blocks; the nearest is shown.`;
    const silent = maps.some((one) => one.silent) && !s.gathers;
    const what = silent
      ? "No attention to show: this block is predicted without context."
      : s.head === MEAN && s.mode === "head"
        ? MODES.head[1].replace("one attention head looks at", "all heads of a layer look at, on average,")
        : MODES[s.mode][1];
    this.find(".ef-note").textContent = `${what} Click another block to choose it.${held ? ` ${few}` : ""}`;
  }

  /** What the chosen block costs, by every model. */
  costsInWords(s, several) {
    const around = "around the picture its border is repeated, because the model takes only some sizes";
    const second = s.hidden.some((site) => this.meta.models[0].steps[site]);
    return [
      ...this.shown.map((one) => verdict(one, several, one.label)),
      isPadding(this.meta, s) ? `<p>It lies in the <b>padding</b>: ${around}.</p>` : "",
      second ? "<p>A hidden block of the second pass changes nothing: no other block looks at it.</p>" : "",
    ].join("");
  }

  /** What the legend has to explain: see legend in numbers.js. */
  shownInLegend(s) {
    const { meta, maps, backdropMost } = this;
    const [, , width, height] = meta.inside;
    const padding = width < 16 * meta.width || height < 16 * meta.height;
    const backdrop = { padding, backdrop: Math.round(s.backdrop), backdropMost };
    const map = maps.find(({ kind }) => kind !== "groups");
    if (!map?.values) return backdrop;
    const cost = maps.find(({ kind, values }) => kind === "cost" && values);
    const framed = meta.models[map.model].kind !== "grouped" && map.k !== DENSE && (map.head !== MEAN || cost === map);
    const k = s.mode === "ks" || s.mode === "pair" ? "k" : map.k;
    return {
      ...map,
      ...backdrop,
      cost: cost?.most,
      alone: maps.filter(({ kind }) => kind === "attention").length < 2,
      hidden: s.hidden.length,
      origin: maps.some((one) => one.kind !== "groups" && one.values && String(one.origin) !== String(one.query)),
      selected: framed && `the ${k} blocks with the highest scores; only these are used`,
    };
  }

  /** Below the legend: the opened calculation, charts, tables of channels. */
  sayMore(s, c, several) {
    const { layer, head } = this.maps.find(({ kind }) => kind !== "groups") ?? s;
    const opened = s.mode === "calculation" ? calculation(this.meta, { ...s, layer, head }, c) : "";
    const scatters = this.maps.filter((map) => map.scatter).map((map) => scatter(map.scatter));
    const tables = this.shown.map((one) => {
      const name = several || one.label ? `${escape(one.label || one.model.name)}: ` : "";
      const { slices, steps, order } = one.model;
      const first = one.query - (one.query % slices);
      const table = channelTable(one, order ? steps.slice(first, first + slices) : null);
      const summary = `<summary>${name}Values and predictions by group of channels</summary>`;
      return `<details class="ef-channels">${summary}${table}</details>`;
    });
    const open = this.find(".ef-channels")?.open;
    this.find(".ef-more").innerHTML = opened + scatters.join("") + tables.join("");
    if (open) for (const details of this.root.querySelectorAll(".ef-channels")) details.open = true;
  }

  /** What context saves in the whole picture, for models of which that is known. */
  sayWhole() {
    const { models } = this.meta;
    const { overviews } = this.answers;
    this.find(".ef-whole-picture").innerHTML = models
      .map((model, i) =>
        overviews[i] ? wholePicture(model, overviews[i], models.length > 1) : "<p>Whole picture: …</p>",
      )
      .join("");
  }

  /** Tells the source and the address what is shown; the overview comes when there is time. */
  keep(s) {
    if (this.source.hash && this.root.isConnected) keepInAddress(s);
    this.source.chosen?.(s);
    clearTimeout(this.later);
    this.later = setTimeout(async () => {
      if (!this.root.isConnected || this.shownNow !== s) return;
      this.source.keep?.({ picture: this.sheet(640, "").toDataURL("image/jpeg", 0.85), caption: this.words });
      if (this.answers.overviews[0]) return;
      await Promise.all(this.meta.models.map((_, i) => this.answers.overview(i))).catch(() => {});
      this.sayWhole();
    }, 600);
  }

  /** What is on the screen: of each map its canvas and title. */
  panels() {
    return [...this.root.querySelectorAll(".ef-panel")].map((figure, i) => ({
      canvas: figure.querySelector("canvas"),
      title: figure.querySelector("figcaption").textContent,
      map: this.maps[i],
    }));
  }

  /** What is on the screen with words below, as a canvas; no wider than `most`. */
  sheet(most = Infinity, words = this.words) {
    const whole = asCanvas(this.panels(), this.columns, words);
    if (whole.width <= most) return whole;
    const small = Object.assign(document.createElement("canvas"), {
      width: most,
      height: Math.round((whole.height * most) / whole.width),
    });
    small.getContext("2d").drawImage(whole, 0, 0, small.width, small.height);
    return small;
  }
}
