// What the user moves: buttons, sliders, the picture itself, the tour, and what can be kept.
import { asCsv, asPython, download } from "./keeping.js";
import { changeOf, isPadding, ksOf, modesOf, mostBackdrop, nearestPredicted, siteOfGroup } from "./selection.js";
import { asSvg } from "./sheet.js";
import { stopsOf } from "./tour.js";
import { BACKDROPS, MEAN, MODES, TERMS, escape, kInWords, number, percent } from "./words.js";

const SLIDERS = {
  layer: "layer",
  head: "head",
  k: "k",
  other_k: "k on the right",
  slice: "channel slice",
  channel: "channel",
};

/** Values that a slider offers, and what is said of one. */
function offersOf(meta) {
  const most = (name) => Math.max(...meta.models.map((model) => model[name]));
  const count = (length) => [...Array(length).keys()];
  const owners = (k) => meta.models.filter((m) => m.own_k === k).map((m) => m.name);
  const own = (k) =>
    owners(k).length === meta.models.length
      ? " (as trained)"
      : owners(k)
          .map((name) => ` (${name}'s own)`)
          .join("");
  const of = (length) => ({ values: count(length), words: (v) => `${v} (0 to ${length - 1})` });
  const ks = { values: ksOf(meta), words: (k) => kInWords(k) + own(k) };
  return {
    layer: of(most("layers")),
    head: {
      values: [MEAN, ...count(most("heads"))],
      words: (v) => `${v === MEAN ? "mean" : v} (mean, 0 to ${most("heads") - 1})`,
    },
    k: ks,
    other_k: ks,
    slice: of(most("slices")),
    channel: of(meta.models[0].channel_groups.flat().length),
  };
}

const headOf = ({ layer, head }) => [layer, head];

/** Builds the controls of an explorer and says what each does. */
export function addControls(explorer) {
  const { root, meta, find } = explorer;
  explorer.offers = offersOf(meta);
  find(".ef-choices").innerHTML = Object.entries(SLIDERS)
    .map(
      ([name, words]) =>
        `<label title="${TERMS[name]}">${words} <input type="range" class="ef-${name}" min="0" step="1" aria-label="${words}"><output></output></label>`,
    )
    .join("");
  for (const [name, { values }] of Object.entries(explorer.offers)) {
    const slider = find(`.ef-${name}`);
    slider.max = values.length - 1;
    slider.addEventListener("input", () => explorer.choose({ [name]: values[slider.valueAsNumber] }));
  }
  for (const mode of modesOf(meta)) {
    const button = Object.assign(document.createElement("button"), {
      textContent: MODES[mode][0],
      title: MODES[mode][1],
      type: "button",
    });
    button.dataset.mode = mode;
    button.addEventListener("click", () => {
      find(".ef-stop").hidden = true; // a tour's words belong to its place and mode
      explorer.choose({ mode });
    });
    find(".ef-modes").append(button);
  }
  const when = (name, event, action) => find(name).addEventListener(event, action);
  for (const name of ["backdrop", "overlay", "part"])
    when(`.ef-${name}`, "input", (event) => {
      explorer.playing = false; // who moves the slider has it
      explorer.choose({ [name]: event.target.valueAsNumber });
    });
  find(".ef-backdrop").max = mostBackdrop(meta);
  when(".ef-dim", "change", (event) => explorer.choose({ dim: event.target.checked }));
  when(".ef-tour", "click", () => {
    if (find(".ef-stop").hidden) explorer.home = { ...explorer.selection };
    tour(explorer, 0);
  });
  when(".ef-play button", "click", () => play(explorer));
  const others = () => explorer.selection.off.filter((pair) => String(pair) !== String(headOf(explorer.selection)));
  when(".ef-head-off", "change", (event) =>
    explorer.choose({ off: event.target.checked ? [...others(), headOf(explorer.selection)] : others() }),
  );
  when(".ef-no-position", "change", (event) => explorer.choose({ position: !event.target.checked }));
  when(".ef-as-it-was", "click", () => {
    find(".ef-hiding").checked = false;
    explorer.choose({ hidden: [], off: [], position: true });
  });
  for (const button of root.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => explorer.zoom.by(Number(button.dataset.zoom)));
  for (const button of root.querySelectorAll("[data-keep]"))
    button.addEventListener("click", () => keep(explorer, button));
  when(".ef-side", "click", (event) => {
    if (event.target.matches(".ef-nearest"))
      explorer.choose({
        ...nearestPredicted(meta, meta.models[event.target.dataset.model].steps, explorer.selection),
        gathers: false,
      });
    if (event.target.matches(".ef-nearest")) find(".ef-panels canvas").focus({ preventScroll: true }); // it goes away
  });
  when(
    ".ef-side",
    "change",
    (event) => event.target.matches(".ef-gathers") && explorer.choose({ gathers: event.target.checked }),
  );
  root.addEventListener("keydown", (event) => {
    if (/^(Arrow|Page|Home|End)/.test(event.key)) event.stopPropagation(); // else JupyterLab takes them
  });
}

/** Says beside a slider, and to screen readers, what its place means. */
function tell(slider, words) {
  slider.nextElementSibling.textContent = words;
  slider.setAttribute("aria-valuetext", words);
}

/** Sets the controls to a selection. */
export function showControls(explorer, s) {
  const { root, meta, find } = explorer;
  const rows = meta.models.some(({ kind }) => kind !== "grouped");
  const decoding = s.mode === "decoding";
  const shown = {
    layer: !decoding,
    head: !decoding && s.mode !== "heads" && s.mode !== "groups",
    k: rows && s.mode !== "ks" && !decoding && !(s.mode === "cost" && meta.costs === "own_k"),
    other_k: s.mode === "pair",
    slice: meta.models.some(({ slices }) => slices > 1) && !decoding,
    channel: s.mode === "calculation",
  };
  for (const [name, { values, words }] of Object.entries(explorer.offers)) {
    const slider = find(`.ef-${name}`);
    slider.value = values.indexOf(s[name]);
    tell(slider, words(s[name]));
    slider.parentElement.hidden = values.length < 2 || !shown[name];
  }
  for (const button of find(".ef-modes").children) button.setAttribute("aria-pressed", button.dataset.mode === s.mode);
  for (const name of ["backdrop", "overlay", "part"]) find(`.ef-${name}`).value = s[name];
  tell(find(".ef-backdrop"), BACKDROPS[Math.round(s.backdrop)]);
  for (const name of ["overlay", "part"]) find(`.ef-${name}`).setAttribute("aria-valuetext", percent(s[name]));
  find(".ef-dim").checked = s.dim;
  find(".ef-play").hidden = !decoding;
  for (const name of ["overlay", "dim", "backdrop"]) find(`.ef-${name}`).parentElement.hidden = decoding;
  find(".ef-whatif").hidden = !meta.whatif || decoding;
  find(".ef-head-off").checked = s.off.some((pair) => String(pair) === String(headOf(s)));
  find(".ef-head-off").disabled = s.head === MEAN || s.mode === "heads";
  find(".ef-no-position").checked = !s.position;
}

/** A frame for one map: its title, its canvas, and what happens on it. */
export function figureOf(explorer, index) {
  const { meta, find } = explorer;
  const figure = Object.assign(document.createElement("figure"), { className: "ef-panel" });
  figure.innerHTML = `<figcaption></figcaption><div class="ef-view"><canvas tabindex="0" role="img"></canvas></div>`;
  const [view, canvas] = [figure.querySelector(".ef-view"), figure.querySelector("canvas")];
  const place = (u, v) => [v * meta.height, u * meta.width].map(Math.floor);
  const tap = (u, v, event) => {
    const map = explorer.maps[index];
    if (map.kind === "groups") {
      const row = Math.floor((v - canvas.table.pad) / canvas.table.cell);
      const model = meta.models[map.model];
      if (row >= 0 && row < model.order.length) explorer.choose(siteOfGroup(model, meta, explorer.selection, row));
      return;
    }
    const [row, column] = place(u, v);
    const site = row * meta.width + column;
    const { hidden } = explorer.selection;
    if (!find(".ef-hiding").checked) explorer.choose(touched(explorer, map, { row, column }, event));
    else if (row === map.query[0] && column === map.query[1])
      return; // it does not look at itself as at others
    else
      explorer.choose({ hidden: hidden.includes(site) ? hidden.filter((other) => other !== site) : [...hidden, site] });
  };
  const hover = (u, v, event) => {
    const tip = find(".ef-tip");
    const map = explorer.maps[index];
    tip.hidden =
      u === null ||
      event.pointerType === "touch" ||
      !map ||
      map.kind === "groups" ||
      map.kind === "decoding" ||
      u < 0 ||
      v < 0 ||
      u >= 1 ||
      v >= 1;
    if (tip.hidden) return;
    tip.textContent = hoverInWords(explorer, map, ...place(u, v));
    const box = explorer.root.getBoundingClientRect();
    tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - 230)}px`;
    tip.style.top = `${event.clientY - box.top + 18}px`;
  };
  explorer.zoom.attach(view, canvas, tap, hover);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const { row, column } = explorer.selection;
    explorer.choose({ row: row + step[0], column: column + step[1] });
  });
  return figure;
}

/** The block that is meant: a finger is wider than a block, so it means one that has something to show. */
function touched({ meta }, map, place, event) {
  const { kind, steps } = meta.models[map.model];
  if (event?.pointerType !== "touch" || kind !== "parallel" || steps[place.row * meta.width + place.column])
    return place;
  return nearestPredicted(meta, steps, place) ?? place;
}

/** What stands at the pointer. */
function hoverInWords(explorer, map, row, column) {
  const site = row * explorer.meta.width + column;
  const words = [`row ${row}, column ${column}`];
  const distance = Math.abs(row - map.query[0]) + Math.abs(column - map.query[1]);
  words.push(distance ? `${distance} block${distance > 1 ? "s" : ""} away` : "the chosen block");
  if (isPadding(explorer.meta, { row, column })) words.push("padding");
  if (map.kind === "cost" && map.values)
    words.push(
      map.selected(site)
        ? `hiding it: ${map.values[site] > 0 ? "+" : ""}${number(map.values[site])} bits`
        : "no head looks at it",
    );
  else if (map.values)
    words.push(
      map.values[site] || map.decoded(site) ? `${percent(map.values[site])} of the attention` : "not decoded yet",
    );
  const overview = explorer.answers.overviews[map.model];
  const { selection, meta } = explorer;
  const usual = selection.k === meta.models[map.model].own_k && !changeOf(selection);
  const bits = overview && number(explorer.answers.perSite(map.model, overview.bits)[site]);
  if (overview) words.push(`costs ${bits} bits${usual ? "" : " as trained"}`);
  return words.join(" · ");
}

/** Shows a stop of the tour. */
async function tour(explorer, number) {
  const { meta, find } = explorer;
  const { bits, alone } = await explorer.answers.overview(0);
  const [spent, without] = [bits, alone].map((values) => explorer.answers.perSite(0, values));
  const stops = stopsOf(meta, spent, without);
  const stop = stops[number];
  const box = find(".ef-stop");
  const focused = document.activeElement?.className;
  box.hidden = false;
  box.innerHTML =
    `<b>${number + 1} of ${stops.length}: ${escape(stop.title)}.</b> ${escape(stop.text)} <span>` +
    `<button type="button" class="ef-before" ${number ? "" : "disabled"}>Back</button><button type="button" class="ef-next">${number + 1 < stops.length ? "Next" : "End"}</button></span>`;
  const [before, next] = [".ef-before", ".ef-next"].map((name) => box.querySelector(name));
  before.addEventListener("click", () => tour(explorer, number - 1));
  next.addEventListener("click", () => (number + 1 < stops.length ? tour(explorer, number + 1) : end()));
  (focused === "ef-before" && number ? before : next).focus({ preventScroll: true }); // the buttons are new, the keys go on
  const end = () => {
    box.hidden = true;
    explorer.choose(explorer.home);
    find(".ef-tour").focus({ preventScroll: true });
  };
  explorer.choose(stop.selection);
}

/** Lets the bytes arrive, in eight seconds. */
function play(explorer) {
  const button = explorer.find(".ef-play button");
  if (explorer.playing) {
    explorer.playing = false;
    button.textContent = "Play";
    return;
  }
  explorer.playing = true;
  button.textContent = "Pause";
  const from = explorer.selection.part >= 1 ? 0 : explorer.selection.part;
  const start = performance.now();
  const frame = async (now) => {
    const part = Math.min(from + Math.max(now - start, 0) / 8000, 1);
    if (!explorer.playing || explorer.selection.mode !== "decoding") part < 1 && (explorer.playing = false);
    else await explorer.choose({ part });
    if (explorer.playing && part < 1) return requestAnimationFrame(frame);
    explorer.playing = false;
    button.textContent = "Play";
  };
  requestAnimationFrame(frame);
}

/** Hands out the view as a picture, drawing, table, line of Python or link. */
async function keep(explorer, button) {
  const { meta, maps, words, selection } = explorer;
  const name = `attention-row${selection.row}-column${selection.column}`;
  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      return explorer.trouble(`This browser does not let the page copy. Copy this by hand: ${text}`);
    }
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = before), 1500);
  };
  switch (button.dataset.keep) {
    case "png":
      return explorer.sheet().toBlob((blob) => download(`${name}.png`, blob));
    case "svg":
      return download(
        `${name}.svg`,
        new Blob([asSvg(meta, explorer.panels(), explorer.columns, words, explorer.view(selection))], { type: "image/svg+xml" }),
      );
    case "csv":
      return download(
        `${name}.csv`,
        new Blob([asCsv(meta, maps, words, explorer.answers.overviews)], { type: "text/csv" }),
      );
    case "python":
      return copied(asPython(meta, selection));
    default:
      return copied(explorer.source.hash ? location.href : asPython(meta, selection));
  }
}
