// The bytes as they arrive: which blocks a decoder knows after so many bits.

/** The arrival of a model's bits. overview: {bits, steps} of every query; z_bits come first. */
export class Arrival {
  constructor(model, { bits, steps }) {
    Object.assign(this, { model, bits, steps, z_bits: model.z_bits ?? 0 });
    this.order = [...bits.keys()].sort((a, b) => steps[a] - steps[b] || a - b);
    this.ends = new Float64Array(bits.length);
    let sum = this.z_bits;
    this.order.forEach((query, i) => (this.ends[i] = sum += bits[query]));
    this.total = sum;
  }

  /** How many queries have wholly arrived after so many bits. */
  known(received) {
    let [low, high] = [0, this.ends.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] <= received + 1e-6) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Of each of n blocks the share of its queries that has arrived: Float32Array [n]. */
  shares(received, n) {
    const { slices } = this.model;
    const shares = new Float32Array(n);
    for (const query of this.order.slice(0, this.known(received))) shares[Math.floor(query / slices)] += 1 / slices;
    return shares;
  }

  /** What has happened, in words. */
  inWords(received) {
    const known = this.known(received);
    const bytes = Math.round(Math.min(received, this.total) / 8);
    const of = `${bytes.toLocaleString("en")} of ${Math.round(this.total / 8).toLocaleString("en")} bytes`;
    if (received < this.z_bits) return `${of}: the side file arrives.`;
    if (known === this.order.length) return `${of}: complete.`;
    const step = this.steps[this.order[known]];
    const count = Math.max(...this.steps) + 1;
    const name =
      { parallel: `pass ${step + 1} of 2`, grouped: `group ${step} of 0 to ${count - 1}` }[this.model.kind] ??
      `block ${step + 1} of ${count}`;
    return `${of}: ${name}.`;
  }
}
