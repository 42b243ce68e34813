// A view on one sheet, as a picture or a drawing: its maps as they lie on the screen, their titles, the caption.
import { DIAMOND, ORIGIN, QUERY, backdropCanvas, colourOf, diamond, rgba, strongest } from "./drawing.js";
import { escape } from "./words.js";

const GAP = 12;

/** Lines of at most `width`, by a measure of text. */
function wrapped(text, width, measure) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines[lines.length - 1]} ${word}`.trim();
    if (measure(longer) > width && lines[lines.length - 1]) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

/** Places of panels of these sizes in rows of `columns`, each below its title.  ->  {places: [[x, y]], width, height} */
function laidOut(sizes, columns, title) {
  const columnOf = (column) => Math.max(...sizes.filter((_, i) => i % columns === column).map(([width]) => width));
  const rows = Array.from({ length: Math.ceil(sizes.length / columns) }, (_, row) =>
    Math.max(...sizes.slice(row * columns, (row + 1) * columns).map(([, height]) => height)),
  );
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const widths = Array.from({ length: Math.min(columns, sizes.length) }, (_, column) => columnOf(column));
  const places = sizes.map((_, i) => [
    sum(widths.slice(0, i % columns)) + GAP * (i % columns),
    sum(rows.slice(0, Math.floor(i / columns))) + (GAP + title) * Math.floor(i / columns) + title,
  ]);
  return {
    places,
    width: sum(widths) + GAP * (widths.length - 1),
    height: sum(rows) + (GAP + title) * rows.length - GAP,
  };
}

/** As a canvas.  panels: [{canvas, title}] */
export function asCanvas(panels, columns, words) {
  const sizes = panels.map(({ canvas }) => [canvas.width, canvas.height]);
  const size = Math.max(14, Math.round(laidOut(sizes, columns, 0).width / 70));
  const { places, width, height } = laidOut(sizes, columns, 2 * size);
  const sheet = Object.assign(document.createElement("canvas"), { width, height });
  const g = sheet.getContext("2d");
  const font = `${size}px system-ui, sans-serif`;
  g.font = font;
  const lines = words ? wrapped(words, width - 16, (text) => g.measureText(text).width) : [];
  sheet.height = height + (words ? (lines.length + 0.6) * size * 1.3 : 0);
  g.fillStyle = "#fff";
  g.fillRect(0, 0, sheet.width, sheet.height);
  Object.assign(g, { fillStyle: "#1a1a1a", font: `600 ${font}` });
  panels.forEach(({ canvas, title }, i) => {
    const [x, y] = places[i];
    g.drawImage(canvas, x, y);
    g.fillText(title, x + 2, y - size * 0.6, canvas.width - 4);
  });
  g.font = font;
  lines.forEach((text, i) => g.fillText(text, 8, height + (i + 1) * size * 1.3));
  return sheet;
}

/** As SVG: of each map the picture underneath, and the blocks as squares that can be edited; tables of groups and what is
 * decoded as pictures.  panels: [{canvas, title, map}]; view: {backdrops, position, overlay, dim, large} */
export function asSvg(meta, panels, columns, words, view) {
  const [w, h, size] = [16 * meta.width, 16 * meta.height, 13];
  const picture = backdropCanvas(w, h, view).toDataURL("image/png");
  const { places, width, height } = laidOut(
    panels.map(() => [w, h]),
    columns,
    22,
  );
  const text = (x, y, words, more = "") => `<text x="${x}" y="${y}"${more}>${escape(words)}</text>`;
  const drawn = panels.map(({ canvas, title, map }, i) => {
    const [x, y] = places[i];
    const plain = ["groups", "decoding"].includes(map.kind);
    const image = `<image width="${w}" height="${h}" xlink:href="${plain ? canvas.toDataURL() : picture}"/>`;
    return `<g transform="translate(${x} ${y})">${text(2, -7, title, ' font-weight="600"')}${image}${plain ? "" : mapInSvg(meta, map, view)}</g>`;
  });
  const lines = wrapped(words, width - 8, (line) => line.length * size * 0.52).map((line, i) =>
    text(4, height + (i + 1) * size * 1.35, line),
  );
  const whole = Math.round(height + (lines.length + 0.6) * size * 1.35);
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ` +
    `viewBox="0 0 ${width} ${whole}" width="${width}" height="${whole}" font-family="sans-serif" font-size="${size}">` +
    `<rect width="100%" height="100%" fill="#fff"/>${drawn.join("")}${lines.join("")}</svg>`
  );
}

function mapInSvg(meta, map, view) {
  const box = (i, more) =>
    `<rect x="${16 * (i % meta.width)}" y="${16 * Math.floor(i / meta.width)}" width="16" height="16" ${more}/>`;
  const site = ([row, column]) => row * meta.width + column;
  const sites = [...Array(meta.height * meta.width).keys()];
  const squares = sites.map((i) => {
    const colour = map.values && colourOf(map.kind, map.values[i], map.most);
    return colour ? box(i, `fill="${rgba(colour.slice(0, 3))}" fill-opacity="${colour[3].toFixed(2)}"`) : "";
  });
  const dim = view.dim ? sites.filter((i) => !map.decoded(i)).map((i) => box(i, 'fill-opacity="0.55"')) : [];
  const [left, top, width, height] = meta.inside;
  const [w, h] = [16 * meta.width, 16 * meta.height];
  const padding = `<path d="M0 0H${w}V${h}H0ZM${left} ${top}h${width}v${height}h${-width}Z" fill="#808080" fill-opacity="0.75" fill-rule="evenodd"/>`;
  const shown = map.values && view.overlay;
  const frames = shown ? sites.filter((i) => map.selected(i)).map((i) => box(i, 'fill="none" stroke="#fff"')) : [];
  const middle = (i) => `x="${16 * (i % meta.width) + 8}" y="${16 * Math.floor(i / meta.width) + 10.5}"`;
  const written =
    shown && view.large
      ? strongest(map).map(
          ([i, words]) =>
            `<text ${middle(i)} font-size="7" font-weight="600" text-anchor="middle" fill="#fff" stroke="#000" stroke-opacity="0.65" stroke-width="1.2" paint-order="stroke">${words}</text>`,
        )
      : [];
  const crosses = map.hidden.map(
    (i) =>
      `<path d="M${16 * (i % meta.width)} ${16 * Math.floor(i / meta.width)}l16 16m0-16l-16 16" stroke="#000" stroke-width="2"/>`,
  );
  const [row, column] = map.origin;
  const edges = diamond(map.radius).map(
    ([x0, y0, x1, y1]) => `M${16 * (column + x0)} ${16 * (row + y0)}L${16 * (column + x1)} ${16 * (row + y1)}`,
  );
  const dashed =
    map.values && map.radius
      ? `<path d="${edges.join("")}" fill="none" stroke="${DIAMOND}" stroke-dasharray="5 4"/>`
      : "";
  const frame = (i, colour) => box(i, `fill="none" stroke="${colour}" stroke-width="3"`);
  const origin = site(map.origin) === site(map.query) ? "" : frame(site(map.origin), ORIGIN);
  return `${dim.join("")}<g opacity="${view.overlay}">${squares.join("")}${frames.join("")}</g>${crosses.join("")}${written.join("")}${padding}${dashed}${origin}${frame(site(map.query), QUERY)}`;
}
