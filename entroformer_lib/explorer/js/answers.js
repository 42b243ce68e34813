// What a selection needs from the source: maps with their values, numbers of the chosen block, pictures behind the maps.
// Each question is asked once and its answer kept. No drawing on the screen.
import { Arrival } from "./decoding.js";
import { bitsMap, largest, ofHead } from "./drawing.js";
import { changeOf, mapsOf, queryOf } from "./selection.js";
import { DENSE, MEAN, kInWords, number } from "./words.js";

export class Answers {
  constructor(source) {
    Object.assign(this, { source, meta: source.meta, pictures: new Map(), known: new Map(), overviews: [] });
    this.when = this.meta.models.map(({ steps, slices }) =>
      Float64Array.from({ length: steps.length / slices }, (_, i) =>
        Math.min(...steps.slice(i * slices, (i + 1) * slices)),
      ),
    );
  }

  /** Asks once, remembers. */
  ask(question, ...args) {
    const key = JSON.stringify([question, ...args]);
    if (!this.known.has(key)) {
      if (this.known.size > 200) this.known.delete(this.known.keys().next().value);
      this.known.set(
        key,
        this.source[question](...args).catch((error) => {
          this.known.delete(key);
          throw error;
        }),
      );
    }
    return this.known.get(key);
  }

  /** A picture that the source makes. */
  async picture(model, name) {
    return this.image((await this.ask("picture", model, name)).url);
  }

  async image(url) {
    if (!url) return null;
    if (!this.pictures.has(url)) {
      const image = new Image();
      image.src = url;
      this.pictures.set(
        url,
        image.decode().then(() => image),
      );
    }
    return this.pictures.get(url);
  }

  async overview(model) {
    this.overviews[model] ??= await this.ask("overview", model);
    return this.overviews[model];
  }

  /** Everything that the present selection shows. */
  async of(s) {
    const { meta } = this;
    const change = meta.whatif && s.mode !== "decoding" ? changeOf(s) : null; // a file is coded as it was trained
    const shown = await Promise.all(
      meta.models.map(async (model, number) => {
        const query = queryOf(meta, model, s);
        const ks = s.mode === "pair" ? [s.k, s.other_k] : [s.mode === "decoding" ? model.own_k : s.k];
        const asked = (what) =>
          Promise.all(ks.map((k) => this.ask("rows", number, query, model.kind === "grouped" ? DENSE : k, what)));
        const [rows, before] = await Promise.all([asked(change), change ? asked(null) : null]);
        return rows.map(({ facts }, i) => ({
          model,
          number,
          query,
          step: model.steps[query],
          facts,
          before: before?.[i].facts.bits,
          label: ks.length > 1 ? `${meta.models.length > 1 ? `${model.name}, ` : ""}${kInWords(ks[i])}` : "",
        }));
      }),
    );
    const flat = shown.flat();
    const maps = await Promise.all(mapsOf(meta, s).map((map) => this.filled(map, s, change)));
    const main = flat[0];
    const { layer, head } = maps[0];
    const c =
      s.mode === "calculation" && main.step
        ? await this.ask("calculation", 0, main.query, s.k, change, layer, head, s.channel)
        : null;
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
    Object.assign(map, {
      hidden: s.hidden,
      step,
      query: [s.row, s.column],
      origin: at(model.origins[query]),
      radius: change && !change.position ? 0 : model.radius,
      decoded: (i) => when[i] < step,
      selected: () => false,
      values: null,
    });
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
    if (model.kind !== "grouped")
      map.title += s.mode === "ks" || s.mode === "pair" ? `: ${number(rows.facts.bits)} bits` : "";
    if (map.kind === "cost" && change)
      return Object.assign(map, { title: `${map.title} (measured of the unchanged model alone: Reset shows it)` });
    if (map.kind === "cost") {
      const { positions, bits, rho } = await this.ask("costs", map.model, query, map.k);
      const [values, hidden] = [new Float32Array(n), new Set(positions)];
      positions.forEach((p, i) => (values[p] = bits[i]));
      const place = map.layer * (model.heads + 1) + (map.head === MEAN ? model.heads : map.head);
      const attention = [...positions].map((p) => probs[p]);
      Object.assign(map, {
        values,
        selected: (i) => hidden.has(i),
        scatter: { attention, bits: [...bits], rho: rho[place] },
      });
    } else {
      Object.assign(map, {
        values: probs,
        selected: (i) => map.head !== MEAN && map.k !== DENSE && probs[i] > 0,
        silent,
      });
    }
    return Object.assign(map, { most: largest(map.values) });
  }

  /** The pictures that the background slider passes; those it is not near are not asked for. */
  async backdrops(s) {
    const near = (place) => Math.abs(s.backdrop - place) < 1;
    const one = async (place) => {
      if (!near(place)) return null;
      if (place === 0) return { canvas: await this.image(this.meta.picture) };
      if (place === 1) return { canvas: await this.picture(0, "reconstruction") };
      const { bits, alone } = await this.overview(0);
      const { steps, kind } = this.meta.models[0];
      const saved = (b, query) => (kind === "parallel" && !steps[query] ? NaN : alone[query] - b);
      const sites = this.perSite(0, place === 2 ? bits : alone && bits.map(saved));
      if (!sites) return null;
      return bitsMap(this.meta, place === 2 ? "spent" : "saved", sites);
    };
    return Promise.all([0, 1, 2, 3].map(one));
  }

  perSite(model, values) {
    const { slices } = this.meta.models[model];
    return (
      values &&
      Float32Array.from({ length: values.length / slices }, (_, i) =>
        values.slice(i * slices, (i + 1) * slices).reduce((a, b) => a + b, 0),
      )
    );
  }

  /** What the decoder has of the file, and the pictures between which it stands, of each model. */
  async arrivals() {
    return Promise.all(
      this.meta.models.map(async (model, i) => {
        const [overview, guess, decoded] = await Promise.all([
          this.overview(i),
          ...["guess", "reconstruction"].map((name) => this.picture(i, name)),
        ]);
        return { arrival: new Arrival(model, { ...overview, steps: model.steps }), guess, decoded };
      }),
    );
  }
}
