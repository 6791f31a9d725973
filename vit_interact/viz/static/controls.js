// Indicator, layer, sliders and switches.

import { h, say } from "./dom.js";
import { OVERLAYS } from "./state.js";
import { percent } from "./numbers.js";

export function makeControls(app) {
  const { meta } = app;
  const choose = (label, options, change) => {
    const select = h("select", { onchange: (event) => change(event.target.value) },
      options.map(([value, words]) => h("option", { value }, words)));
    return { select, row: h("label", { class: "field" }, h("span", {}, label), select) };
  };
  const indicator = choose("indicator", meta.indicators.map((one) => [one.name, one.label]),
    (value) => app.set({ indicator: value }));
  const layer = choose("layer", [["all", "all (mean of layers)"], ...meta.layers.map((k) => [String(k), `layer ${k}`])],
    (value) => app.set({ layer: value === "all" ? "all" : Number(value) }));
  const slide = (label, min, max, step, read, change) => {
    const output = h("output", {});
    const input = h("input", { type: "range", min, max, step, oninput: (event) => change(Number(event.target.value)) });
    return { row: h("label", { class: "field" }, h("span", {}, label, " ", output), input),
             draw(value) { if (Number(input.value) !== value) input.value = value; say(output, read(value)); } };
  };
  const coverage = slide("window holds", 0.05, 1, 0.01, percent, (value) => app.set({ coverage: value }));
  const removed = slide("remove the least discriminative", 0, 0.95, 0.05, percent, (value) => app.set({ removed: value }));
  const log = h("input", { type: "checkbox", onchange: (event) => app.set({ log: event.target.checked }) });
  const switches = Object.entries(OVERLAYS)
    .filter(([name]) => name !== "predicted" || meta.windowGroups > 0)
    .map(([name, { label, whole }]) => {
      const box = h("input", { type: "checkbox", "data-overlay": name,
        onchange: (event) => app.set({ on: { ...app.state.on, [name]: event.target.checked } }) });
      const opacity = h("input", { type: "range", min: 0.1, max: 1, step: 0.05, "aria-label": `opacity of ${label}`,
        oninput: (event) => app.set({ opacity: { ...app.state.opacity, [name]: Number(event.target.value) } }) });
      return { name, box, opacity, whole, row: h("div", { class: "switch" }, h("label", { class: "check" }, box, ` ${label}`), opacity) };
    });
  const rows = (whole) => switches.filter((one) => Boolean(one.whole) === whole).map((one) => one.row);
  const agreement = meta.agreement;
  const element = h("section", { class: "controls", "aria-label": "what is shown" },
    meta.indicators.length > 1 ? indicator.row : null, layer.row, coverage.row, removed.row,
    h("label", { class: "check" }, log, " logarithmic colours"),
    h("fieldset", {}, h("legend", {}, "of the chosen patch"), rows(false)),
    h("fieldset", {}, h("legend", {}, "of the whole image"), rows(true)),
    h("p", { class: "muted small" },
      `Maps are kept in ${meta.bits} bits: entries are off by at most ${percent(agreement.error)} of the largest ` +
      `of their row, and of ${agreement.compared.toLocaleString("en")} windows that hold ${percent(agreement.coverage)}, ` +
      `${percent(agreement.differ)} differ from those of the unrounded maps.` +
      (meta.bits === 8 && agreement.differ > 0.02 ? " --bits 16 keeps them closer." : "")));
  return { element, draw({ state }) {
    indicator.select.value = state.indicator;
    layer.select.value = String(state.layer);
    coverage.draw(state.coverage);
    removed.draw(state.removed);
    log.checked = state.log;
    for (const { name, box, opacity } of switches) {
      box.checked = state.on[name];
      opacity.value = state.opacity[name];
      opacity.disabled = !state.on[name];
    }
  } };
}

const KEYS = [
  ["arrow keys", "walk over the patches"], ["Enter, Space or click", "pin the patch; a second pin compares two"],
  ["Escape", "take pins off"], ["[ and ]", "layer before, after"], [", and .", "image before, after"],
  ["i", "next indicator"], ["w, r, g", "window, received impact, impact of the patch on or off"], ["?", "this help"],
];

export function makeHelp() {
  const close = h("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const dialog = h("dialog", { "aria-label": "help" }, h("h2", {}, "How to read this"),
    h("p", {}, "Colours over the photograph say how much of its impact the chosen patch takes from each other patch " +
      "(a row of the map), or how much each patch takes from it (a column). The box is the smallest that holds the " +
      "chosen share of the row; the arrow points to where its impact comes from on average."),
    h("dl", {}, KEYS.flatMap(([key, words]) => [h("dt", {}, key), h("dd", {}, words)])), close);
  return dialog;
}
