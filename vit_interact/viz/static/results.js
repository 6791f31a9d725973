// Tabs beside the images: curves with intervals, tables and maps of results.py.

import { h, say } from "./dom.js";
import { fromBase64 } from "./data.js";
import { legendSvg, cellCanvas } from "./paint.js";
import { strength } from "./marks.js";
import { told } from "./numbers.js";

export function makeResults(results, app) {
  return Object.entries(results).map(([name, { title, note, blocks }]) => ({ name, title,
    element: h("div", { class: "results" }, h("p", { class: "muted" }, note), blocks.map((block) =>
      h("section", { class: "panel" }, h("h2", {}, block.title), MAKERS[block.kind](block, app)))) }));
}

const MAKERS = { curves: makeCurves, table: makeTable, maps: makeMaps };

function makeTable({ columns, rows }) {
  const number = (text) => /^[-–]?[\d.]+$/.test(text);
  return h("table", {}, h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((text, k) =>
      k ? h("td", { class: number(text) ? "number" : null }, text) : h("th", { scope: "row" }, text))))));
}

function niceTicks(low, high, about = 5) {
  const rough = (high - low) / about || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

const GREY = "#6b7280"; // of controls; on a dark page it would vanish

function makeCurves({ xlabel, ylabel, lines: given }) {
  const lines = given.map((line) => (line.color === GREY ? { ...line, color: "currentColor" } : line));
  const [height, left, right, top, bottom] = [380, 62, 18, 14, 48];
  let width = 760; // as wide as it is shown, so that words keep their size on a phone
  const plot = h("svg", { class: "chart curves", role: "img", "aria-label": `${ylabel} against ${xlabel}` });
  const note = h("output", { class: "small muted note" });
  const hidden = new Set();
  const finite = (values) => values.filter((value) => value !== null);
  const xs = lines.flatMap((line) => line.x), ys = lines.flatMap((line) => finite([...line.y, ...(line.low ?? []), ...(line.high ?? [])]));
  const [x0, x1] = [Math.min(0, ...xs), Math.max(...xs)], [y0, y1] = [Math.min(0, ...ys), Math.max(...ys, 1e-9)];
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const draw = () => {
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const drawn = [
      ...niceTicks(y0, y1).map((value) => h("g", {}, h("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "rule" }),
        h("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, told(value)))),
      ...niceTicks(x0, x1, width / 95).map((value) => h("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, told(value))),
      h("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, xlabel),
      h("text", { x: -(top + height - bottom) / 2, y: 14, "text-anchor": "middle", transform: "rotate(-90)" }, ylabel)];
    const shown = lines.filter((_, k) => !hidden.has(k));
    for (const line of shown) {
      if (!line.low) continue;
      const kept = line.x.map((_, k) => k).filter((k) => line.low[k] !== null && line.high[k] !== null);
      const points = [...kept.map((k) => [x(line.x[k]), y(line.high[k])]), ...kept.reverse().map((k) => [x(line.x[k]), y(line.low[k])])];
      drawn.push(h("polygon", { points: points.join(" "), fill: line.color, opacity: 0.1 }));
    }
    for (const line of shown) {
      const kept = line.x.map((at, k) => [x(at), y(line.y[k] ?? NaN)]).filter(([, at]) => Number.isFinite(at));
      drawn.push(h("polyline", { points: kept.join(" "), stroke: line.color, style: `stroke-width:${line.width ?? 2}`, "stroke-dasharray": line.dash ? line.dash.join(" ") : null }));
      for (const [a, b] of kept) drawn.push(h("circle", { cx: a, cy: b, r: 2.6, fill: line.color }));
    }
    plot.replaceChildren(...drawn);
  };
  plot.addEventListener("pointermove", (event) => {
    const place = plot.getBoundingClientRect(), scale = width / place.width;
    const [a, b] = [(event.clientX - place.left) * scale, (event.clientY - place.top) * scale];
    let best = null, near = 40;
    lines.forEach((line, k) => line.x.forEach((at, j) => {
      if (hidden.has(k) || line.y[j] === null) return;
      const away = Math.hypot(x(at) - a, y(line.y[j]) - b);
      if (away < near) [near, best] = [away, `${line.label}: ${told(line.y[j])}` +
        (line.low ? ` (${told(line.low[j])} to ${told(line.high[j])})` : "") + ` at ${told(at)}`];
    }));
    say(note, best ?? "");
  });
  const legend = h("div", { class: "legend" }, lines.map((line, k) => {
    const button = h("button", { type: "button", "aria-pressed": "true", onclick: () => {
      if (!hidden.delete(k)) hidden.add(k);
      button.setAttribute("aria-pressed", String(!hidden.has(k)));
      draw();
    } }, h("svg", { viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true" },
      h("line", { x1: 1, x2: 29, y1: 4, y2: 4, stroke: line.color, "stroke-width": 1 + (line.width ?? 2), "stroke-dasharray": line.dash ? line.dash.join(" ") : null })),
    ` ${line.label}`);
    return button;
  }));
  draw();
  new ResizeObserver(([{ contentRect }]) => {
    const wanted = Math.min(760, Math.max(280, Math.round(contentRect.width)));
    if (contentRect.width && wanted !== width) {
      width = wanted;
      draw();
    }
  }).observe(plot);
  return [plot, note, legend];
}

function makeMaps({ unit, rows, cols, low, high, maps }, app) {
  const scale = { low, high, log: true, beyond: false };
  const middle = `offsets of the key from the query, in patches: ${-(rows - 1) / 2} to ${(rows - 1) / 2} down, ${-(cols - 1) / 2} to ${(cols - 1) / 2} across`;
  const tiles = maps.map(([title, text]) => {
    const values = new Float32Array(fromBase64(text).buffer), colors = new Uint8ClampedArray(4 * values.length);
    values.forEach((value, k) => {
      const entry = 3 * Math.round(strength(value, scale) * 255);
      colors.set(app.tables.impact.subarray(entry, entry + 3), 4 * k);
      colors[4 * k + 3] = 255;
    });
    const canvas = cellCanvas(colors, rows, cols);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title}, highest ${told(100 * Math.max(...values))} %`);
    return h("figure", {}, h("figcaption", { class: "small" }, title), canvas);
  });
  const holder = document.createElement("div");
  const drawn = legendSvg({ title: "mean impact", unit, scale, table: "impact" }, app.tables, 360, "currentColor");
  holder.innerHTML = `<svg width="360" viewBox="0 0 360 ${drawn.height}" class="scale" role="img" aria-label="scale">${drawn.svg}</svg>`;
  return [h("p", { class: "muted small" }, middle), h("div", { class: "maps" }, tiles), holder.firstChild];
}
