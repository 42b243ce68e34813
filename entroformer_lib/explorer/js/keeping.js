// What can be taken away from a view: its address, a picture, a table, a line of Python.
import { colourOf, rgba } from "./drawing.js";
import { escape } from "./words.js";

const KEPT = ["row", "column", "slice", "layer", "head", "k", "other_k", "mode", "channel", "backdrop", "dim", "gathers"];

/** The selection as the part of an address behind #. */
export const toHash = (s) => new URLSearchParams(KEPT.map((name) => [name, String(s[name])])).toString();

/** What an address says; numbers as numbers. */
export function fromHash(hash) {
  const parts = Object.fromEntries(new URLSearchParams(hash.replace(/^#/, "")));
  return Object.fromEntries(KEPT.filter((name) => name in parts).map((name) => [name, /^-?[\d.]+$/.test(parts[name]) ? Number(parts[name]) : parts[name]]));
}

/** A cell that shows the same view. */
export function asPython(meta, s) {
  const servers = meta.models.map(({ name }) => `server_of(load_model("${name}"), "PICTURE")`);
  const parts = KEPT.filter((name) => !["backdrop", "dim", "gathers"].includes(name)).map((name) => `${name}=${typeof s[name] === "string" ? `"${s[name]}"` : s[name]}`);
  return [
    "from entroformer_lib import load_model",
    "from entroformer_lib.explorer.widget import Explorer",
    "from entroformer_lib.inspection.group_server import server_of",
    `Explorer(${servers.join(", ")}, ${parts.join(", ")})`,
  ].join("\n");
}

/** All canvases side by side with words below, if any, as a canvas. */
export function withCaption(canvases, words) {
  const [width, height] = [canvases.reduce((sum, c) => sum + c.width + 12, -12), Math.max(...canvases.map((c) => c.height))];
  const sheet = Object.assign(document.createElement("canvas"), { width, height });
  const size = Math.max(14, Math.round(width / 70));
  const g = sheet.getContext("2d");
  g.font = `${size}px system-ui, sans-serif`;
  const lines = [""];
  for (const word of words.split(" ")) {
    const longer = `${lines[lines.length - 1]} ${word}`.trim();
    if (g.measureText(longer).width > width - 16) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  sheet.height = height + (words ? (lines.length + 0.6) * size * 1.3 : 0);
  Object.assign(g, { fillStyle: "#fff" });
  g.fillRect(0, 0, sheet.width, sheet.height);
  let left = 0;
  for (const canvas of canvases) {
    g.drawImage(canvas, left, 0);
    left += canvas.width + 12;
  }
  Object.assign(g, { fillStyle: "#1a1a1a", font: `${size}px system-ui, sans-serif` });
  lines.forEach((text, i) => g.fillText(text, 8, height + (i + 1) * size * 1.3));
  return sheet;
}

/** A map as SVG: the photograph, the blocks as squares that can be edited, the caption. */
export function asSvg(meta, map, words) {
  const n = meta.height * meta.width;
  const box = (i, more) => `<rect x="${16 * (i % meta.width)}" y="${16 * Math.floor(i / meta.width)}" width="16" height="16" ${more}/>`;
  const squares = [...Array(n).keys()].map((i) => {
    const colour = map.values && colourOf(map.kind, map.values[i], map.most);
    return colour ? box(i, `fill="${rgba(colour.slice(0, 3))}" fill-opacity="${colour[3].toFixed(2)}"`) : "";
  });
  const frames = [...Array(n).keys()].filter((i) => map.values && map.selected(i)).map((i) => box(i, 'fill="none" stroke="#fff"'));
  const [w, h] = [16 * meta.width, 16 * meta.height];
  const query = box(map.query[0] * meta.width + map.query[1], 'fill="none" stroke="#D55E00" stroke-width="4"');
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 ${w} ${h + 40}"><image width="${w}" height="${h}" xlink:href="${meta.picture}"/>` +
    `${squares.join("")}${frames.join("")}${query}<foreignObject x="0" y="${h}" width="${w}" height="40"><p xmlns="http://www.w3.org/1999/xhtml" style="font:13px sans-serif;margin:4px">${escape(words)}</p></foreignObject></svg>`
  );
}

/** The maps as a table, one row for each block and map. */
export function asCsv(meta, maps, words) {
  const lines = [`# ${words.replace(/\n/g, " ")}`, "map,row,column,value,taken_part,decoded"];
  for (const map of maps) {
    if (!map.values) continue;
    const name = `"${map.title.replace(/"/g, "'")}"`;
    map.values.forEach((v, i) => lines.push([name, Math.floor(i / meta.width), i % meta.width, v.toPrecision(6), Number(map.selected(i)), Number(map.decoded(i))].join()));
  }
  return lines.join("\n") + "\n";
}

/** Hands a file to the browser. */
export function download(name, blob) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
