// From state and maps to a list of marks in patches, which paint.js puts on canvas or into SVG.

import { field, smallestWindow, quantile, allTendencies, told } from "./numbers.js";

export const PIN_COLORS = ["#00e5ff", "#ffb000"];
const PREDICTED_COLOR = "#7dff6a";
const DECADES = 3; // of a logarithmic scale

// Where `value` lies between the ends of a scale, 0 to 1.
export function strength(value, scale) {
  const { low, high, log } = scale;
  if (log) return value <= low ? 0 : Math.min(1, Math.log(value / low) / Math.log(high / low));
  return Math.min(1, Math.max(0, (value - low) / (high - low)));
}

export function makeScale(values, log, signed) {
  const sizes = signed ? Float64Array.from(values, Math.abs) : values;
  let most = 0, least = Infinity;
  for (const value of values) {
    if (value > most) most = value;
    if (value < least) least = value;
  }
  const high = quantile(sizes, 0.98) || (signed ? Math.max(most, -least) : most) || 1;
  if (signed) return { low: -high, high, log: false, beyond: most > high || -least > high };
  if (log) return { low: high / 10 ** DECADES, high, log: true, beyond: most > high };
  return { low: 0, high, log: false, beyond: most > high };
}

export function cells(values, scale, table, opacity) {
  const colors = new Uint8ClampedArray(4 * values.length);
  for (let j = 0; j < values.length; j++) {
    const value = values[j];
    if (!Number.isFinite(value)) continue;
    const share = strength(value, scale), entry = 3 * Math.round(share * 255);
    for (let k = 0; k < 3; k++) colors[4 * j + k] = table[entry + k];
    // Weak values let the photograph through; of signed ones the weak are in the middle.
    const weight = scale.low < 0 ? 0.15 + 0.85 * Math.abs(2 * share - 1) : 0.4 + 0.6 * share;
    colors[4 * j + 3] = 255 * opacity * weight;
  }
  return { type: "cells", colors };
}

export const rowOf = (map, patch, patches) => map.shares.subarray(patch * patches, (patch + 1) * patches);

export function columnOf(map, patch, patches) {
  const column = new Float32Array(patches);
  for (let i = 0; i < patches; i++) column[i] = map.shares[i * patches + patch];
  return column;
}

// Patches in the order of removal: the lowest received impact first, equal ones by number.
export function removalOrder(impact) {
  return Array.from(impact.keys()).sort((a, b) => impact[a] - impact[b] || a - b);
}

export function impactOf(view) {
  const { meta, state } = view, patches = meta.rows * meta.cols;
  const row = state.layer === "all" ? 0 : 1 + meta.layers.indexOf(state.layer);
  return view.impact.subarray(row * patches, (row + 1) * patches);
}

// The chosen patches: two pins are compared, else one pin, else where the pointer is.
export const chosenPatches = ({ pins, patch }) => (pins.length ? pins : patch === null ? [] : [patch]);

// {marks, legends}: what is drawn, in order, and the scales that explain it.
export function mainMarks(view) {
  const { meta, state, map, tables } = view;
  const { rows, cols } = meta, patches = rows * cols;
  const chosen = chosenPatches(state), marks = [], legends = [];
  const on = (name) => state.on[name] && state.opacity[name] > 0;
  const heat = (values, name, title, unit) => {
    const signed = values.some((value) => value < 0);
    const scale = makeScale(values, state.log && !signed, signed);
    const table = signed ? "signed" : "impact";
    marks.push(cells(values, scale, tables[table], state.opacity[name]));
    legends.push({ title, unit, scale, table });
  };
  const twoOf = (take) => take[0].map((value, j) => value - take[1][j]);

  if (on("received") && view.impact) {
    heat(impactOf(view), "received", "received impact", state.layer === "all" ? meta.combinedUnit : meta.unit);
  }
  if (map && on("wheel")) marks.push(...wheelCells(view, legends));
  if (map && chosen.length) {
    for (const [name, pick, words] of [
      ["taken", rowOf, "on"], ["given", columnOf, "of"],
    ]) {
      if (!on(name)) continue;
      const values = chosen.map((patch) => pick(map, patch, patches));
      const title = chosen.length === 2 ? `impact ${words} A minus ${words} B` : `impact ${words} the patch`;
      heat(chosen.length === 2 ? twoOf(values) : values[0], name, title, "share of the row");
    }
  }
  if (state.removed > 0 && view.impact) {
    const gone = removalOrder(impactOf(view)).slice(0, Math.floor(state.removed * patches + 1e-9));
    const colors = new Uint8ClampedArray(4 * patches);
    for (const patch of gone) colors.set([150, 155, 160, 235], 4 * patch);
    marks.push({ type: "cells", colors, plain: true }); // over the photograph in its colours
  }
  if (map && on("arrows")) marks.push(...allArrows(view, legends));
  chosen.forEach((patch, k) => marks.push(...ofPatch(view, patch, PIN_COLORS[k], on)));
  return { marks, legends };
}

function ofPatch(view, patch, color, on) {
  const { meta, state, map } = view, { rows, cols } = meta;
  const r = Math.floor(patch / cols), c = patch % cols, marks = [];
  if (on("predicted") && view.predicted) marks.push(...predictedBoxes(view, patch));
  if (map) {
    const row = rowOf(map, patch, rows * cols);
    if (on("window")) {
      const box = smallestWindow(row, rows, cols, patch, state.coverage);
      marks.push({ type: "box", box, color, opacity: state.opacity.window, width: 2 });
    }
    const found = field(row, rows, cols, patch);
    if (found && on("ellipse")) {
      const [y, x] = found.tendency;
      const center = [r + 0.5 + y, c + 0.5 + x];
      marks.push({ type: "ellipse", center, axes: found.axes, angle: found.angle, color,
                   opacity: state.opacity.ellipse, width: 2 });
    }
    if (found && on("arrow")) {
      marks.push(arrow(r, c, ...found.tendency, color, state.opacity.arrow, 2.5));
    }
  }
  marks.push({ type: "box", box: [r, c, r + 1, c + 1], color, opacity: 1, width: 3, chosen: true });
  return marks;
}

// Shortened alike, so that the longest but a few reach no further than the next arrow.
function allArrows(view, legends) {
  const { rows, cols } = view.meta, all = tendencies(view), full = fullLength(all);
  const stride = Math.max(1, Math.ceil(Math.max(rows, cols) / 20)), scale = (0.9 * stride) / full;
  const marks = [];
  for (let r = (stride - 1) >> 1; r < rows; r += stride) {
    for (let c = (stride - 1) >> 1; c < cols; c += stride) {
      const [y, x] = all.subarray(3 * (r * cols + c), 3 * (r * cols + c) + 2);
      const short = scale * Math.min(1, full / Math.hypot(y, x));
      if (Number.isFinite(y)) marks.push(arrow(r, c, short * y, short * x, "#ffffff", view.state.opacity.arrows, 1.2));
    }
  }
  const length = `an arrow as long as ${stride === 1 ? "a patch" : `${stride} patches`} is ${told(full / 0.9)} or more`;
  legends.push({ title: "arrows", unit: "patches", words: length });
  return marks;
}

function fullLength(all) {
  const lengths = new Float64Array(all.length / 3);
  for (let i = 0; i < lengths.length; i++) lengths[i] = Math.hypot(all[3 * i], all[3 * i + 1]);
  return quantile(lengths, 0.95) || 1;
}

const arrow = (r, c, y, x, color, opacity, width) =>
  ({ type: "arrow", from: [r + 0.5, c + 0.5], to: [r + 0.5 + y, c + 0.5 + x], color, opacity, width });

function predictedBoxes({ meta, state, predicted }, patch) {
  const patches = meta.rows * meta.cols, groups = meta.windowGroups;
  const layers = meta.windowLayers.filter((layer) => state.layer === "all" || layer === state.layer);
  return layers.flatMap((layer) => Array.from({ length: groups }, (_, group) => {
    const first = 4 * ((meta.windowLayers.indexOf(layer) * groups + group) * patches + patch);
    const opacity = state.opacity.predicted / (state.layer === "all" ? 1.5 : 1);
    return { type: "box", box: Array.from(predicted.subarray(first, first + 4)),
             color: PREDICTED_COLOR, opacity, width: 1.5, dash: [5, 3] };
  }));
}

export function tendencies({ meta, map }) {
  map.tendencies ??= allTendencies(map.shares, meta.rows, meta.cols);
  return map.tendencies;
}

function wheelCells(view, legends) {
  const { meta, state, tables } = view, patches = meta.rows * meta.cols;
  const all = tendencies(view), full = fullLength(all);
  const colors = new Uint8ClampedArray(4 * patches);
  for (let i = 0; i < patches; i++) {
    if (!Number.isFinite(all[3 * i])) continue;
    colors.set(wheelColor(tables.wheel, all[3 * i], all[3 * i + 1], full), 4 * i);
    colors[4 * i + 3] = 255 * state.opacity.wheel;
  }
  legends.push({ title: "tendency", unit: "patches", wheel: full });
  return [{ type: "cells", colors }];
}

export function wheelColor(table, y, x, full) {
  const hues = table.length / 3 / 16;
  const turn = Math.atan2(y, x) / (2 * Math.PI);
  const hue = ((Math.round(turn * hues) % hues) + hues) % hues;
  const step = Math.round(Math.min(1, Math.hypot(y, x) / full) * 15);
  const entry = 3 * (step * hues + hue);
  return table.subarray(entry, entry + 3);
}
