// A tour of six places of the picture, found by their numbers.
import { isPadding } from "./selection.js";

/** bits, alone: of each site, of the first model.  ->  [{title, text, selection}], places that exist in this picture. */
export function stopsOf(meta, bits, alone) {
  const [model] = meta.models;
  const { slices } = model;
  const n = meta.height * meta.width;
  const predicted = [...Array(n).keys()].filter((site) => model.steps[site * slices] > 0 || slices > 1);
  const [left, top, width, height] = meta.inside.map((v) => v / 16);
  const at = (site) => [Math.floor(site / meta.width), site % meta.width];
  const whole = (site) => {
    const [row, column] = at(site);
    return row >= top && column >= left && row + 1 <= top + height && column + 1 <= left + width;
  };
  const inside = predicted.filter(whole);
  const padding = (site) => isPadding(meta, { row: at(site)[0], column: at(site)[1] });
  const rim = inside.filter((site) => {
    const [row, column] = at(site);
    return row - top < 1 || column - left < 1 || top + height - row < 2 || left + width - column < 2;
  });
  const best = (sites, value) => sites.reduce((a, b) => (a === null || value(b) > value(a) ? b : a), null);
  const most = (value) =>
    best(
      inside.filter((site) => value(site) > 0),
      value,
    ); // where a sentence says that it is so
  const which = model.kind === "parallel" ? " of the second pass" : "";
  const found = [
    [
      "Context helps",
      "Here context saves most bits. What it looks at often resembles it.",
      alone && most((i) => alone[i] - bits[i]),
    ],
    ["Smooth", `The cheapest block${which}. Its prediction is nearly certain.`, best(inside, (i) => -bits[i])],
    [
      "Texture",
      `The block${which} that costs most: nothing that is known tells its details.`,
      best(inside, (i) => bits[i]),
    ],
    [
      "Border",
      "A block at the border of the picture: many of the neighbours that it learned to look at are missing.",
      best(rim, (i) => bits[i]),
    ],
    [
      "Context hurts",
      "Here the prediction with context is worse than without: its neighbours give a wrong hint, often at an edge.",
      alone && most((i) => bits[i] - alone[i]),
    ],
  ];
  const stops = found.filter(([, , site]) => site !== null && site !== undefined && site !== false);
  const start = [...model.steps.keys()].filter((query) => !model.steps[query]); // queries that have no context
  if (model.kind === "parallel")
    stops.push([
      "First pass",
      "A block of the first pass is coded from the side file alone. Its neighbours of the second pass look at it.",
      start.find((site) => site > n / 2 && !padding(site)) ?? start[0],
    ]);
  else
    stops.push([
      "The beginning",
      "Where nothing is decoded yet, there is nothing to look at.",
      Math.floor(start[0] / slices),
      start[0] % slices,
    ]);
  return stops.map(([title, text, site, slice]) => ({
    title,
    text,
    selection: {
      row: at(site)[0],
      column: at(site)[1],
      mode: "head",
      layer: model.layer ?? model.layers - 1,
      head: 0,
      k: model.own_k,
      ...(slice === undefined ? {} : { slice }),
    },
  }));
}
