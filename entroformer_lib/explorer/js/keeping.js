// What can be taken away from a view: its address, a table, a line of Python. Pictures are made in sheet.js.

const KEPT = [
  "row",
  "column",
  "slice",
  "layer",
  "head",
  "k",
  "other_k",
  "mode",
  "channel",
  "backdrop",
  "dim",
  "gathers",
];

/** The selection as the part of an address behind #. */
export const toHash = (s) => new URLSearchParams(KEPT.map((name) => [name, String(s[name])])).toString();

/** What an address says; numbers as numbers. */
export function fromHash(hash) {
  const parts = Object.fromEntries(new URLSearchParams(hash.replace(/^#/, "")));
  return Object.fromEntries(KEPT.filter((name) => name in parts).map((name) => [name, fromText(parts[name])]));
}

/** Writes a selection into the address, where that is allowed: Safari refuses a hundred changes in half a minute. */
export function keepInAddress(s) {
  const hash = `#${toHash(s)}`;
  try {
    if (hash !== location.hash) history.replaceState(null, "", hash);
  } catch {
    // the next choice comes
  }
}

function fromText(text) {
  if (text === "true" || text === "false") return text === "true";
  return text.trim() && !Number.isNaN(Number(text)) ? Number(text) : text;
}

/** A cell that shows the same view of a picture, scaled as it is here. */
export function asPython(meta, s) {
  const [, , width, height] = meta.inside;
  const referenced = meta.models.some(({ reference }) => reference);
  const server = ({ name, reference }) =>
    `    server_of(load_model(${named(name)}), picture${reference ? `, reference_of(load_model(${named(name)}))` : ""}),`;
  const named = (name) => (/^[\w.-]+(@[\d.e-]+)?$/.test(name) ? `"${name}"` : '"MODEL"'); // a file, or untrained
  const inPython = (value) =>
    typeof value === "string" ? `"${value}"` : typeof value === "boolean" ? (value ? "True" : "False") : value;
  const parts = KEPT.filter((name) => s[name] !== false).map((name) => `${name}=${inPython(s[name])}`);
  return [
    "from entroformer_lib import load_model",
    "from entroformer_lib.explorer.widget import Explorer",
    "from entroformer_lib.inspection.group_server import server_of",
    "from entroformer_lib.inspection.scene import fitting",
    ...(referenced ? ["from entroformer_lib.weights.zoo import reference_of"] : []),
    "",
    `picture = fitting("PICTURE", ${Math.max(width, height)})`,
    "Explorer(",
    ...meta.models.map(server),
    `    ${parts.join(", ")},`,
    ")",
  ].join("\n");
}

/** The maps as a table, one row for each block and map; tables of groups and what is decoded where there is nothing else.
 * overviews: of the models, see explorer.js */
export function asCsv(meta, maps, words, overviews) {
  const named = (map, ...cells) => [`"${map.title.replace(/"/g, "'")}"`, ...cells].join();
  const at = (i, width) => [Math.floor(i / width), i % width];
  const onGrid = maps.filter(({ kind, values }) => kind !== "groups" && values);
  const tables = {
    maps: [
      "map,row,column,value,taken_part,decoded",
      onGrid.map((map) =>
        [...map.values].map((v, i) =>
          named(map, ...at(i, meta.width), v.toPrecision(6), Number(map.selected(i)), Number(map.decoded(i))),
        ),
      ),
    ],
    groups: [
      "map,predicted_group,slot_seen,value",
      maps.map((map) =>
        [...(map.values ?? [])].map((v, i) =>
          named(map, ...at(i, meta.models[map.model].order?.length), v.toPrecision(6)),
        ),
      ),
    ],
    decoding: [
      "map,row,column,slice,step,bits",
      maps.map((map) => {
        const { slices, steps } = meta.models[map.model];
        return [...(overviews[map.model]?.bits ?? [])].map((bits, query) =>
          named(map, ...at(Math.floor(query / slices), meta.width), query % slices, steps[query], bits.toPrecision(6)),
        );
      }),
    ],
  };
  const [head, rows] = tables[onGrid.length ? "maps" : maps[0].kind] ?? tables.maps;
  return [`# ${words.replace(/\n/g, " ")}`, head, ...rows.flat()].join("\n") + "\n";
}

/** Hands a file to the browser. */
export function download(name, blob) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
