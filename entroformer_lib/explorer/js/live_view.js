// The live model as a source of the explorer: what live.js answers, with the names that explorer.js reads.
import { mount } from "./explorer.js";

/** The explorer of a photograph that the page's model has seen. source: a LiveSource */
export function mountLive(root, source) {
  const { meta } = source;
  const [width, height] = meta.size;
  const padding = [16 * meta.width - width, 16 * meta.height - height];
  const inside = [...padding.map((both) => Math.floor(both / 2)), width, height];
  return mount(root, {
    meta: { ...meta, inside },
    hash: true,
    overview: (number) => source.overview(number),
    rows: (...asked) => source.rows(...asked),
    costs: (...asked) => source.costs(...asked),
    picture: async (number, name) => ({ url: name === "guess" ? await source.guess() : meta.reconstruction }),
    async calculation(...asked) {
      const { pmf, ...found } = await source.calculation(...asked);
      return { ...found, ...pmf };
    },
  });
}
