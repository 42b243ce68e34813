// A tour of six places of the picture, found by their numbers.

/** overview: of the first model.  ->  [{title, text, selection}], places that exist in this picture. */
export function stopsOf(meta, overview) {
  const [model] = meta.models;
  const { slices } = model;
  const n = meta.height * meta.width;
  const sum = (values) => values && Float32Array.from({ length: n }, (_, site) => values.subarray(site * slices, (site + 1) * slices).reduce((a, b) => a + b, 0));
  const [bits, alone] = [sum(overview.bits), sum(overview.alone)];
  const predicted = [...Array(n).keys()].filter((site) => model.steps[site * slices] > 0 || slices > 1);
  const [left, top, width, height] = meta.inside.map((v) => v / 16);
  const at = (site) => [Math.floor(site / meta.width), site % meta.width];
  const inside = predicted.filter((site) => {
    const [row, column] = at(site);
    return row >= top && column >= left && row + 1 <= top + height && column + 1 <= left + width;
  });
  const rim = inside.filter((site) => {
    const [row, column] = at(site);
    return row - top < 1 || column - left < 1 || top + height - row < 2 || left + width - column < 2;
  });
  const best = (sites, value) => sites.reduce((a, b) => (a === null || value(b) > value(a) ? b : a), null);
  const found = [
    ["Texture", "The block that costs most. Look how many places it gathers from.", best(inside, (i) => bits[i])],
    ["Smooth", "One of the cheapest blocks, sky or wall: the prediction is nearly certain, so attention hardly matters.", best(inside, (i) => -bits[i])],
    ["Rim", "A block at the border of the picture: half of the neighbours that it learned to look at are missing.", best(rim, (i) => bits[i])],
    ["Context helps", "Here context saves most bits. What it looks at often resembles it.", alone && best(inside, (i) => alone[i] - bits[i])],
    ["Context hurts", "Here the prediction with context is worse than without: what stands around misleads, often at an edge.", alone && best(inside, (i) => bits[i] - alone[i])],
  ];
  const stops = found.filter(([, , site]) => site !== null && site !== undefined && site !== false);
  if (model.kind === "parallel") stops.push(["First pass", "A block of the first pass is coded from the side file alone. Its neighbours of the second pass look at it.", [...model.steps.keys()].find((site) => !model.steps[site] && site > n / 2)]);
  else stops.push(["The beginning", "Where nothing is decoded yet, there is nothing to look at.", 0]);
  return stops.map(([title, text, site]) => ({ title, text, selection: { row: at(site)[0], column: at(site)[1], mode: "head" } }));
}
