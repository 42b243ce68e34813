// The source of an exported page: answers that were stored when it was written. Layout: explorer/page.py.
import { mount } from "./explorer.js";
import { DENSE } from "./words.js";

async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const sumsOf = (counts) => {
  const sums = new Uint32Array(counts.length + 1);
  counts.forEach((count, i) => (sums[i + 1] = sums[i] + count));
  return sums;
};
const ofByte = (byte) => (byte / 255) ** 2;

export class StoredSource {
  static async open(meta, base64) {
    return new StoredSource(meta, await inflate(base64));
  }

  constructor(meta, buffer) {
    Object.assign(this, { meta, begin: meta.begin, hash: true });
    const { stored } = meta;
    const [model] = meta.models;
    this.n = meta.height * meta.width;
    const queries = this.n * model.slices;
    for (const name of ["steps", "origins"]) model[name] = new Uint16Array(buffer, stored[name], queries);
    const bits = (start) => (start === null ? null : new Float32Array(buffer, start, queries));
    this.all = { bits: bits(stored.bits), alone: bits(stored.alone) };
    this.sections = new Map(stored.sections.map((s) => [s.k, new Section(s, model, this.n, buffer)]));
    this.hidden = stored.costs && new Costs(stored.costs, model, buffer);
    if (stored.cross) {
      this.place = new Uint16Array(buffer, stored.cross.place, this.n);
      this.between = new Uint8Array(
        buffer,
        stored.cross.bytes,
        stored.cross.count * model.layers * model.heads * model.order.length ** 2,
      );
    }
  }

  held(mode, ks) {
    const [model] = this.meta.models;
    const wanted = mode === "ks" ? model.ks : model.kind === "grouped" ? [DENSE] : ks;
    const sites = [...wanted.map((k) => this.sections.get(k).sites), ...(mode === "cost" ? [this.hidden.sites] : [])];
    const least = sites.reduce((a, b) => (b.length < a.length ? b : a));
    return least.length < this.n ? least : null;
  }

  async overview() {
    return this.all;
  }

  async picture(model, name) {
    return { url: this.meta.stored.pictures[name] };
  }

  async rows(model, query, k) {
    const section = this.sections.get(k);
    return { probs: section.probs(query), facts: section.facts(query) };
  }

  async costs(model, query, k) {
    if (k !== this.meta.models[0].own_k)
      throw new Error("The page holds costs for the model's own k only. Choose that k.");
    return this.hidden.of(query);
  }

  async cross(model, query) {
    const { layers, heads, order, slices } = this.meta.models[0];
    const size = layers * heads * order.length ** 2;
    const start = this.place[Math.floor(query / slices)] * size;
    return { probs: Float32Array.from(this.between.subarray(start, start + size), ofByte) };
  }
}

/** All rows of one k: counts, positions and bytes of what is attended. */
class Section {
  constructor(s, model, n, buffer) {
    Object.assign(this, { sites: s.sites, model, n });
    this.number = new Map(s.sites.map((site, i) => [site, i]));
    const queries = s.sites.length * model.slices; // site by site, in each its channel slices
    const maps = queries * model.layers * model.heads;
    this.width = 2 + 5 * model.channel_groups.length;
    this.factsOf = new Float32Array(buffer, s.facts, queries * this.width);
    this.starts = sumsOf(new Uint16Array(buffer, s.counts, maps));
    this.positions = new Uint16Array(buffer, s.positions, this.starts[maps]);
    this.bytes = new Uint8Array(buffer, s.bytes, this.starts[maps]);
  }

  /** The number of a query among what is held. */
  at(query) {
    const { slices } = this.model;
    return this.number.get(Math.floor(query / slices)) * slices + (query % slices);
  }

  /** Attention of one query: Float32Array [layers * heads * n]. */
  probs(query) {
    const maps = this.model.layers * this.model.heads;
    const [out, first] = [new Float32Array(maps * this.n), this.at(query) * maps];
    for (let map = 0; map < maps; map++) {
      for (let i = this.starts[first + map]; i < this.starts[first + map + 1]; i++)
        out[map * this.n + this.positions[i]] = ofByte(this.bytes[i]);
    }
    return out;
  }

  facts(query) {
    const at = this.at(query);
    const known = (v) => (Number.isNaN(v) ? null : v);
    const [bits, alone, ...rest] = [...this.factsOf.subarray(at * this.width, (at + 1) * this.width)].map(known);
    const groups = this.model.channel_groups.map(({ length }, i) => {
      const [value, mean, scale, b, a] = rest.slice(5 * i, 5 * i + 5);
      return { channels: length, value, mean, scale, bits: b, alone: a };
    });
    return { bits, alone, groups, ...(this.model.order ? { slice: query % this.model.slices } : {}) };
  }
}

/** Measured costs, and how attention ranks them. */
class Costs {
  constructor(c, { layers, heads }, buffer) {
    Object.assign(this, { sites: c.sites, size: layers * (heads + 1) });
    this.starts = sumsOf(new Uint16Array(buffer, c.counts, c.sites.length));
    this.positions = new Uint16Array(buffer, c.positions, this.starts[c.sites.length]);
    this.bits = new Float32Array(buffer, c.bits, this.starts[c.sites.length]);
    this.rho = new Float32Array(buffer, c.rho, c.sites.length * this.size);
  }

  of(site) {
    const i = this.sites.indexOf(site);
    const part = (array) => array.subarray(this.starts[i], this.starts[i + 1]);
    return {
      positions: part(this.positions),
      bits: part(this.bits),
      rho: this.rho.subarray(i * this.size, (i + 1) * this.size),
    };
  }
}

/** Opens the exported page. */
export async function openPage(root, meta, base64) {
  return mount(root, await StoredSource.open(meta, base64));
}
