// The viewer: `mount(element, meta, load, options)` shows what pack.py made. `load(key)` gives bytes.

import { h, say, download } from "./dom.js";
import { fromBase64, Maps } from "./data.js";
import { firstState, fromHash, toHash } from "./state.js";
import { mainMarks, chosenPatches, impactOf } from "./marks.js";
import { greyCanvas, legendSvg, paint, sheetSvg, svgToPng } from "./paint.js";
import { makeControls, makeHelp } from "./controls.js";
import { makeGrowth, makeMultiples, makeReadout, placeOf } from "./panels.js";
import { makeList, shownImages } from "./list.js";
import { makeResults } from "./results.js";
import { field, percent, smallestWindow } from "./numbers.js";

// options: {css, results, theme, address: keep the state in the page's address, first: changes of the
// first state, onchange(state)}.
export function mount(host, meta, load, options = {}) {
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const app = { meta, maps: new Maps(meta, load), pictures: new Map(), asked: new Set(), options,
                numbers: { field, smallestWindow } };
  app.tables = Object.fromEntries(Object.entries(meta.colors).map(([name, text]) => [name, fromBase64(text)]));
  app.state = options.address ? fromHash(location.hash, meta)
    : { ...firstState(meta), ...options.first };
  app.set = (changes) => {
    if (Object.entries(changes).every(([key, value]) => app.state[key] === value)) return;
    app.state = { ...app.state, ...changes };
    drawSoon(app);
  };
  root.replaceChildren(h("style", {}, options.css ?? ""), build(app));
  if (options.theme) app.element.dataset.theme = options.theme;
  if (options.address) {
    addEventListener("hashchange", () => {
      if (location.hash.slice(1) !== toHash(app.state, meta)) app.set(fromHash(location.hash, meta));
    });
  }
  new ResizeObserver(() => drawSoon(app)).observe(app.box);
  draw(app);
  return app;
}

// With the next frame; until then, and until its maps are there, the page does not call itself ready.
function drawSoon(app) {
  app.element.removeAttribute("data-ready");
  app.due ??= requestAnimationFrame(() => { app.due = null; draw(app); });
}

function build(app) {
  const { meta } = app;
  app.canvas = h("canvas", { tabindex: 0, role: "application", "aria-label": "photograph; arrow keys choose a patch",
    onpointermove: (event) => point(app, event), onpointerleave: () => app.set({ probe: null }),
    onclick: (event) => pin(app, patchAt(app, event)), onkeydown: (event) => key(app, event) });
  app.box = h("div", { class: "box" }, app.canvas);
  app.title = h("h2", { class: "title" });
  app.status = h("p", { class: "error", role: "alert", hidden: true });
  app.scales = h("div", { class: "scales" });
  app.parts = { list: makeList(app), controls: makeControls(app), readout: makeReadout(app),
                multiples: makeMultiples(app), growth: makeGrowth(app) };
  app.help = makeHelp();
  const results = makeResults(app.options.results ?? {}, app);
  app.tabs = [["images", "Images"], ...results.map(({ name, title }) => [name, title])];
  app.tabButtons = app.tabs.map(([name, title]) => h("button", { type: "button", role: "tab", id: `tab-${name}`,
    "aria-controls": `view-${name}`, onclick: () => app.set({ tab: name }), onkeydown: (event) => tabKey(app, event) }, title));
  const { list, controls, readout, multiples, growth } = app.parts;
  const images = h("div", { class: "columns" }, list.element,
    h("div", { class: "stage" }, app.title, app.status, app.box, app.scales, multiples.element),
    h("aside", { class: "panel side" }, readout.element, controls.element, growth.element));
  app.views = [["images", images], ...results.map(({ name, element }) => [name, element])].map(([name, element]) =>
    h("div", { role: app.tabs.length > 1 ? "tabpanel" : null, id: `view-${name}`,
               "aria-labelledby": app.tabs.length > 1 ? `tab-${name}` : null }, element));
  const tools = h("div", { class: "tools" },
    h("button", { type: "button", "data-act": "png", onclick: () => save(app, "png") }, "PNG"),
    h("button", { type: "button", "data-act": "svg", onclick: () => save(app, "svg") }, "SVG"),
    app.options.address ? h("button", { type: "button", onclick: (event) => copyAddress(event.target) }, "Copy link") : null,
    h("button", { type: "button", onclick: () => turn(app) }, "Light or dark"),
    h("button", { type: "button", onclick: () => app.help.showModal() }, "Help"));
  app.element = h("div", { class: "app" },
    h("header", { class: "top" }, h("div", {}, h("h1", {}, "Patch interactions"),
      h("p", { class: "muted small" }, `${meta.model}, ${meta.rows} x ${meta.cols} patches, ${meta.layers.length} layers`)),
    app.tabs.length > 1 ? h("div", { class: "tabs", role: "tablist" }, app.tabButtons) : null, tools),
    app.views, app.help);
  return app.element;
}

function patchAt({ canvas, meta }, event) {
  const place = canvas.getBoundingClientRect();
  const row = Math.floor(((event.clientY - place.top) / place.height) * meta.extent[0]);
  const col = Math.floor(((event.clientX - place.left) / place.width) * meta.extent[1]);
  return row >= 0 && row < meta.rows && col >= 0 && col < meta.cols ? row * meta.cols + col : null;
}

function point(app, event) {
  const patch = patchAt(app, event);
  if (patch === null || event.pointerType === "touch") return;
  app.set(app.state.pins.length ? { probe: patch, spoken: false } : { patch, probe: patch, spoken: false });
}

function pin(app, patch) {
  if (patch === null) return;
  const { pins } = app.state;
  const next = pins.includes(patch) ? pins.filter((one) => one !== patch) : [...pins, patch].slice(-2);
  app.set({ pins: next, patch, probe: patch, spoken: true });
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const SWITCHES = { w: "window", r: "received", g: "given" };

function key(app, event) {
  const { meta, state } = app, { rows, cols } = meta;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = (values, now, by) => values[Math.min(values.length - 1, Math.max(0, values.indexOf(now) + by))];
  if (MOVES[event.key]) {
    const [down, right] = MOVES[event.key], at = state.probe ?? state.patch ?? Math.floor(rows / 2) * cols + Math.floor(cols / 2);
    const row = Math.min(rows - 1, Math.max(0, Math.floor(at / cols) + down));
    const col = Math.min(cols - 1, Math.max(0, (at % cols) + right)), patch = row * cols + col;
    app.set(state.pins.length ? { probe: patch, spoken: true } : { patch, probe: patch, spoken: true });
  } else if (event.key === "Enter" || event.key === " ") pin(app, state.probe ?? state.patch);
  else if (event.key === "Escape") app.set({ pins: [], spoken: true });
  else if (event.key === "[" || event.key === "]") {
    app.set({ layer: step(["all", ...meta.layers], state.layer, event.key === "]" ? 1 : -1) });
  } else if (event.key === "," || event.key === ".") {
    const shown = shownImages(meta, state);
    if (shown.length) app.set({ image: step(shown, state.image, event.key === "." ? 1 : -1), pins: [], patch: null });
  } else if (event.key === "i") {
    const names = meta.indicators.map((one) => one.name);
    app.set({ indicator: names[(names.indexOf(state.indicator) + 1) % names.length] });
  } else if (SWITCHES[event.key]) {
    const name = SWITCHES[event.key];
    app.set({ on: { ...state.on, [name]: !state.on[name] } });
  } else if (event.key === "?") app.help.showModal();
  else return;
  event.preventDefault();
}

function tabKey(app, event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  const names = app.tabs.map(([name]) => name);
  const next = (names.indexOf(app.state.tab) + by + names.length) % names.length;
  app.set({ tab: names[next] });
  app.tabButtons[next].focus();
}

function turn(app) {
  const dark = app.element.dataset.theme
    ? app.element.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  app.element.dataset.theme = dark ? "light" : "dark";
  app.drawn = null;
  draw(app);
}

async function copyAddress(button) {
  let words = "Copied";
  try {
    await navigator.clipboard.writeText(location.href);
  } catch {
    words = "The address bar has it";
  }
  say(button, words);
  setTimeout(() => say(button, "Copy link"), 2000);
}

function picture(app, index) {
  const address = app.meta.images[index].picture;
  if (!address) return { ready: true };
  if (!app.pictures.has(index)) {
    const entry = { ready: false };
    const image = new Image();
    image.onload = () => {
      Object.assign(entry, { ready: true, image, grey: greyCanvas(image) });
      drawSoon(app);
    };
    image.onerror = () => {
      entry.ready = true; // as without a photograph
      drawSoon(app);
    };
    image.src = address;
    app.pictures.set(index, entry);
  }
  return app.pictures.get(index);
}

// Maps of what is shown first, then of all layers; each draws again when it is there. One that
// cannot be read is asked for again only when something else was looked at in between.
function fetchMaps(app) {
  const { maps, meta, state } = app, base = `${state.image}/${state.indicator}`;
  if (app.base !== base) [app.base, app.failed] = [base, new Map()];
  const predicted = meta.windowGroups ? [`${state.image}/predicted`] : [];
  const layers = [state.layer, "impact", ...(meta.layers.length > 1 ? ["all"] : []), ...meta.layers];
  for (const key of [...layers.map((layer) => `${base}/${layer}`), ...predicted]) {
    if (maps.now(key) || app.asked.has(key) || app.failed.has(key)) continue;
    app.asked.add(key);
    const [image, indicator, layer] = key.split("/"), { failed } = app;
    const found = indicator === "predicted" ? maps.predicted(image)
      : layer === "impact" ? maps.impact(image, indicator) : maps.map(image, indicator, layer);
    found.catch((error) => failed.set(key, error.message))
      .then(() => { app.asked.delete(key); drawSoon(app); });
  }
  const wrong = [...app.failed][0];
  app.status.hidden = !wrong;
  say(app.status, wrong ? `A map cannot be read (${wrong[0]}): ${wrong[1]}` : "");
}

function viewOf(app) {
  const { maps, meta, state, tables } = app, base = `${state.image}/${state.indicator}`;
  const { unit, combinedUnit } = meta.indicators.find((one) => one.name === state.indicator);
  return { meta: { ...meta, unit, combinedUnit }, state, maps, tables, map: maps.now(`${base}/${state.layer}`),
           impact: maps.now(`${base}/impact`), predicted: maps.now(`${state.image}/predicted`) };
}

function draw(app) {
  const started = performance.now();
  const { meta } = app;
  fetchMaps(app);
  let view = viewOf(app);
  if (view.impact && app.state.patch === null && !app.state.pins.length) {
    // Something to see before anyone points: the patch that affects the others most.
    const impact = impactOf(view);
    const patch = impact.indexOf(Math.max(...impact));
    app.state = { ...app.state, patch };
    view = viewOf(app);
  }
  const { state } = app;
  app.element.dataset.tab = tabOf(app);
  app.views.forEach((element, k) => { element.hidden = app.tabs[k][0] !== tabOf(app); });
  app.tabButtons.forEach((button, k) => {
    const chosen = app.tabs[k][0] === tabOf(app);
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  });
  drawStage(app, view);
  app.parts.readout.draw(view);
  app.parts.multiples.draw(view);
  app.parts.growth.draw(view);
  const still = [state.image, state.indicator, state.layer, state.coverage, state.removed, state.log, state.on,
                 state.opacity, state.filter, state.wrong, state.label];
  if (!app.drawn || still.some((value, k) => value !== app.drawn[k])) {
    app.drawn = still;
    app.parts.list.draw(view);
    app.parts.controls.draw(view);
  }
  if (app.options.address) remember(app);
  app.options.onchange?.(state);
  app.lastDraw = performance.now() - started;
  app.ready = Boolean(view.map && view.impact && picture(app, state.image).ready);
  app.element.toggleAttribute("data-ready", app.ready);
  app.element.dataset.patch = chosenPatches(state).join(",");
}

const tabOf = (app) => (app.tabs.some(([name]) => name === app.state.tab) ? app.state.tab : "images");

// Browsers take few changes of the address a second, so it follows with a pause.
function remember(app) {
  clearTimeout(app.remembering);
  app.remembering = setTimeout(() => {
    const hash = toHash(app.state, app.meta);
    if (location.hash.slice(1) !== hash) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }, 250);
}

function drawStage(app, view) {
  const { meta, canvas, box } = app, { state } = view;
  const image = meta.images[state.image];
  const guess = image.guesses.length ? `${image.guesses[0][0]} (${percent(image.guesses[0][1])})` : "no classes";
  say(app.title, `${image.name}: ${guess}${image.label && image.label !== image.guesses[0]?.[0] ? `, is ${image.label}` : ""}`);
  const wide = Math.max(120, Math.min(box.clientWidth, 640 * Math.min(1, meta.aspect), 720)), high = wide / meta.aspect;
  const dense = devicePixelRatio || 1;
  if (canvas.width !== Math.round(wide * dense) || canvas.height !== Math.round(high * dense)) {
    [canvas.width, canvas.height] = [Math.round(wide * dense), Math.round(high * dense)];
    [canvas.style.width, canvas.style.height] = [`${wide}px`, `${high}px`];
  }
  const unit = [high / meta.extent[0], wide / meta.extent[1]];
  const { marks, legends } = mainMarks(view);
  const shown = picture(app, state.image);
  const heat = marks.some((mark) => mark.type === "cells" && !mark.plain);
  const context = canvas.getContext("2d");
  context.setTransform(dense, 0, 0, dense, 0, 0);
  app.shown = { ground: shown.ready ? (heat ? shown.grey : shown.image) : null, marks, legends };
  paint(context, app.shown.ground, marks, meta, unit);
  const key = JSON.stringify([legends, Math.round(wide), app.element.dataset.theme]);
  if (key !== app.legendKey) {
    app.legendKey = key;
    app.scales.replaceChildren(...legends.map((legend) => {
      const drawn = legendSvg(legend, app.tables, Math.min(wide, 420), "currentColor");
      const holder = document.createElement("div");
      holder.innerHTML = `<svg width="${Math.min(wide, 420)}" height="${drawn.height}" class="scale" role="img" ` +
        `aria-label="scale">${drawn.svg}</svg>`; // made of our own words only
      return holder.firstChild;
    }));
  }
  canvas.setAttribute("aria-label", `photograph ${image.name}; ` + (chosenPatches(state).length
    ? `patch at ${chosenPatches(state).map((patch) => placeOf(patch, meta.cols)).join(" against ")}` : "arrow keys choose a patch"));
}

async function save(app, kind) {
  const { meta, state } = app, image = meta.images[state.image];
  const wide = 640 * Math.min(1, meta.aspect), unit = [wide / meta.aspect / meta.extent[0], wide / meta.extent[1]];
  const named = meta.indicators.find((one) => one.name === state.indicator).label;
  const layer = state.layer === "all" ? "mean of layers" : `layer ${state.layer}`;
  const places = chosenPatches(state).map((patch) => placeOf(patch, meta.cols));
  const { ground, marks, legends } = app.shown;
  let still = ground;
  if (ground && !ground.toDataURL) {
    still = document.createElement("canvas");
    [still.width, still.height] = [ground.naturalWidth, ground.naturalHeight];
    still.getContext("2d").drawImage(ground, 0, 0);
  }
  const subtitle = [named, layer, places.length ? `patch at ${places.join(" (A) against ")}${places.length > 1 ? " (B)" : ""}` : "",
    `window holds ${percent(state.coverage)}`].filter(Boolean).join("  ·  ");
  const svg = sheetSvg({ title: image.name, subtitle, ground: still, marks, legends, tables: app.tables, meta, unit });
  const name = `${image.name.split("/").at(-1).replace(/[^\w.-]+/g, "_")}_${state.indicator}_${state.layer}`;
  if (kind === "svg") download(`${name}.svg`, new Blob([svg], { type: "image/svg+xml" }));
  else download(`${name}.png`, await svgToPng(svg));
}
