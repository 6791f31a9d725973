// What stands beside the photograph: words about the chosen patch, all layers, growth with depth.

import { h, say } from "./dom.js";
import { cells, chosenPatches, columnOf, impactOf, makeScale, PIN_COLORS, rowOf, tendencies } from "./marks.js";
import { field, percent, smallestWindow, told } from "./numbers.js";

const STRONGEST = 5;

export function placeOf(patch, cols) {
  return `row ${Math.floor(patch / cols)}, column ${patch % cols}`;
}

export function strongest(row, count = STRONGEST) {
  return Array.from(row.keys()).sort((a, b) => row[b] - row[a] || a - b).slice(0, count)
    .filter((patch) => row[patch] > 0);
}

function facts(view, patch) {
  const { meta, state, map } = view, { rows, cols } = meta, patches = rows * cols;
  const row = rowOf(map, patch, patches), found = field(row, rows, cols, patch);
  if (!found) return null;
  const [top, left, bottom, right] = smallestWindow(row, rows, cols, patch, state.coverage);
  const [y, x] = found.tendency;
  return [
    ["received impact", view.impact ? told(impactOf(view)[patch]) : "–"],
    ["window", `${bottom - top} x ${right - left}, ${percent((bottom - top) * (right - left) / patches)} of the grid`],
    ["spread", `${told(found.spread)} patches`],
    ["tendency", `${told(Math.abs(y))} ${y < 0 ? "up" : "down"}, ${told(Math.abs(x))} ${x < 0 ? "left" : "right"}`],
    ["entropy", `${told(found.entropy)} of log P`],
  ];
}

export function makeReadout() {
  const boxes = h("div", { class: "readouts" });
  const probe = h("output", { class: "probe" });
  const live = h("div", { class: "unseen", "aria-live": "polite" });
  const element = h("section", { class: "readout", "aria-label": "chosen patch" }, boxes, probe, live);
  return { element, draw(view) {
    const { meta, state, map } = view, { cols } = meta, patches = meta.rows * cols;
    const chosen = chosenPatches(state);
    if (!map || !chosen.length) {
      boxes.replaceChildren(h("p", { class: "muted" }, map ? "Point at a patch, or walk with the arrow keys." : "Reading …"));
      say(probe, "");
      delete probe.dataset.share;
      return;
    }
    boxes.replaceChildren(...chosen.map((patch, k) => {
      const known = facts(view, patch);
      const title = h("h3", {}, h("span", { class: "swatch", style: `background:${PIN_COLORS[k]}` }),
        chosen.length === 2 ? `${"AB"[k]}: ` : "", `patch at ${placeOf(patch, cols)}`);
      if (!known) return h("div", {}, title, h("p", {}, "Nothing reaches this patch here: its row is zero."));
      const row = rowOf(map, patch, patches);
      return h("div", {}, title,
        h("dl", {}, known.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
        h("p", { class: "muted small" }, "takes most from"),
        h("ol", {}, strongest(row).map((from) =>
          h("li", { "data-patch": from }, `${placeOf(from, cols)}${from === patch ? " (itself)" : ""}: ${percent(row[from])}`))));
    }));
    const at = state.probe ?? (state.pins.length ? null : state.patch);
    if (at === null || at === undefined) {
      say(probe, "");
      delete probe.dataset.share;
    } else {
      const taken = chosen.map((patch) => map.shares[patch * patches + at]);
      probe.dataset.share = taken.join(",");
      probe.dataset.patch = at;
      say(probe, state.pins.length
        ? `From ${placeOf(at, cols)}: ${taken.map((share, k) => `${chosen.length === 2 ? `${"AB"[k]} ` : ""}${percent(share)}`).join(", ")} of the row`
        : `From itself: ${percent(taken[0])} of the row`);
    }
    if (state.spoken) {
      say(live, chosen.map((patch) => {
        const row = rowOf(map, patch, patches), from = strongest(row, 3);
        return `Patch at ${placeOf(patch, cols)}` + (state.pins.includes(patch) ? ", pinned" : "") +
          (from.length ? `; takes most from ${from.map((p) => `${placeOf(p, cols)} ${percent(row[p])}`).join("; ")}` : "; its row is zero");
      }).join(". "));
    }
  } };
}

// One small map a layer for the chosen patch; a click takes that layer.
export function makeMultiples(app) {
  const { meta } = app;
  const all = [...(meta.layers.length > 1 ? ["all"] : []), ...meta.layers];
  const tiles = all.map((layer) => {
    const canvas = h("canvas", { "aria-hidden": "true", style: `aspect-ratio:${meta.aspect * meta.cols / meta.extent[1] * meta.extent[0] / meta.rows}` });
    const note = h("span", { class: "small muted" });
    const name = layer === "all" ? "all layers" : `layer ${layer}`;
    const button = h("button", { type: "button", class: "tile", onclick: () => app.set({ layer }) },
      h("span", { class: "small" }, name), canvas, note);
    return { layer, canvas, note, button };
  });
  const hint = h("p", { class: "muted small" });
  let drawn = null;
  const element = h("section", { class: "multiples", "aria-label": "layers" },
    h("h2", {}, "Layer by layer"), hint, h("div", { class: "tiles" }, tiles.map((tile) => tile.button)));
  return { element, draw(view) {
    const { state, maps, tables } = view, patches = meta.rows * meta.cols;
    const chosen = chosenPatches(state), given = state.on.given && !state.on.taken;
    const there = all.map((layer) => maps.now(`${state.image}/${state.indicator}/${layer}`));
    const still = [...there, state.layer, state.log, given, ...chosen];
    if (drawn && still.length === drawn.length && still.every((value, k) => value === drawn[k])) return;
    drawn = still;
    const what = `Impact ${given ? "of" : "on"} ${chosen.length === 2 ? `A minus that ${given ? "of" : "on"} B` : "the chosen patch"} in each layer, `;
    say(hint, what + (chosen.length === 2 ? "violet and orange: the number below each map or more."
      : `${state.log ? "logarithmic, " : ""}bright: the number below each map or more.`));
    for (const [k, { layer, canvas, note, button }] of tiles.entries()) {
      button.setAttribute("aria-pressed", String(layer === state.layer));
      const map = there[k];
      if (!map || !chosen.length) {
        canvas.width = canvas.height = 0;
        say(note, "–");
        continue;
      }
      const rows = chosen.map((patch) => (given ? columnOf : rowOf)(map, patch, patches));
      const values = rows.length === 2 ? rows[0].map((value, j) => value - rows[1][j]) : rows[0];
      const signed = rows.length === 2, scale = makeScale(values, state.log && !signed, signed);
      const { colors } = cells(values, scale, tables[signed ? "signed" : "impact"], 1);
      for (let j = 3; j < colors.length; j += 4) colors[j] = 255;
      if (!canvas.width) [canvas.width, canvas.height] = [meta.cols, meta.rows];
      canvas.getContext("2d").putImageData(new ImageData(colors, meta.cols, meta.rows), 0, 0);
      say(note, values.some((value) => value !== 0) ? `${signed ? "± " : ""}${percent(scale.high)}` : "all zero");
    }
  } };
}

// Spread and window area of the chosen patch by layer, beside the mean over patches.
export function makeGrowth(app) {
  const { meta } = app;
  const spread = makeChart("spread", "patches"), area = makeChart("window area", "% of the grid");
  const element = h("section", { class: "growth", "aria-label": "growth with depth" },
    h("h2", {}, "Growth with depth"), spread.element, area.element);
  element.hidden = meta.layers.length < 2;
  let drawn = null;
  return { element, draw(view) {
    const { state, maps } = view, { rows, cols } = meta, patches = rows * cols;
    const chosen = chosenPatches(state);
    const found = meta.layers.map((layer) => maps.now(`${state.image}/${state.indicator}/${layer}`));
    const still = [...found, state.coverage, ...chosen];
    if (drawn && still.length === drawn.length && still.every((value, k) => value === drawn[k])) return;
    drawn = still;
    const each = (take) => chosen.map((patch) => found.map((map) => {
      const row = map && rowOf(map, patch, patches);
      return row && row.some((share) => share > 0) ? take(row, patch) : NaN;
    }));
    const means = found.map((map) => {
      if (!map) return NaN;
      if (map.meanSpread === undefined) {
        const all = tendencies({ meta, map });
        let sum = 0, count = 0;
        for (let i = 2; i < all.length; i += 3) if (Number.isFinite(all[i])) [sum, count] = [sum + all[i], count + 1];
        map.meanSpread = count ? sum / count : NaN;
      }
      return map.meanSpread;
    });
    spread.draw(meta.layers, [...each((row, patch) => field(row, rows, cols, patch).spread)
      .map((values, k) => ({ values, color: PIN_COLORS[k], label: chosen.length === 2 ? "AB"[k] : "patch" })),
      { values: means, color: "currentColor", label: "mean", dash: true }]);
    area.draw(meta.layers, each((row, patch) => {
      const [top, left, bottom, right] = smallestWindow(row, rows, cols, patch, state.coverage);
      return 100 * (bottom - top) * (right - left) / patches;
    }).map((values, k) => ({ values, color: PIN_COLORS[k], label: chosen.length === 2 ? "AB"[k] : "patch" })));
  } };
}

function makeChart(title, unit) {
  const [width, height, left, right, top, bottom] = [280, 118, 36, 44, 8, 22];
  const plot = h("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${title} by layer` });
  const element = h("figure", {}, h("figcaption", { class: "small" }, `${title} (${unit})`), plot);
  return { element, draw(layers, lines) {
    const most = Math.max(1e-9, ...lines.flatMap((line) => line.values.filter(Number.isFinite)));
    const x = (k) => left + (k / Math.max(1, layers.length - 1)) * (width - left - right);
    const y = (value) => height - bottom - (value / most) * (height - top - bottom);
    const drawn = [0, most / 2, most].map((value) => [
      h("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "rule" }),
      h("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, told(value, 2))]);
    const step = Math.ceil(layers.length / 8);
    layers.forEach((layer, k) => {
      if (k % step === 0) drawn.push(h("text", { x: x(k), y: height - 6, "text-anchor": "middle" }, String(layer)));
    });
    const ends = [];
    for (const { values, color, label, dash } of lines) {
      const points = values.map((value, k) => [x(k), y(value), value]).filter(([, , value]) => Number.isFinite(value));
      if (!points.length) continue;
      // The outline keeps bright lines legible on a light ground.
      for (const outline of dash ? [false] : [true, false]) {
        drawn.push(h("polyline", { points: points.map(([a, b]) => `${a},${b}`).join(" "), class: outline ? "outline" : "line",
          stroke: outline ? null : color, "stroke-dasharray": dash ? "4 3" : null }));
      }
      ends.push([points.at(-1)[1] + 4, label]);
    }
    // Words at the ends of lines keep clear of each other.
    let last = -Infinity;
    for (const [at, label] of ends.sort((one, other) => one[0] - other[0])) {
      last = Math.max(at, last + 11);
      drawn.push(h("text", { x: width - right + 6, y: last }, label));
    }
    plot.replaceChildren(...drawn.flat());
  } };
}
