// Marks on a canvas, and the same marks as SVG.

import { told } from "./numbers.js";
import { wheelColor } from "./marks.js";

// A canvas with a colour for each patch; the browser enlarges it.
export function cellCanvas(colors, rows, cols) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [cols, rows];
  canvas.getContext("2d").putImageData(new ImageData(colors, cols, rows), 0, 0);
  return canvas;
}

// The photograph without colours and darker, so that only data is coloured above it.
export function greyCanvas(picture) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < data.data.length; k += 4) {
    const [red, green, blue] = data.data.subarray(k, k + 3);
    const luma = 0.8 * (0.299 * red + 0.587 * green + 0.114 * blue);
    data.data.fill(luma, k, k + 3);
  }
  context.putImageData(data, 0, 0);
  return canvas;
}

function head(from, to, unit, width) {
  const [y, x] = [(to[0] - from[0]) * unit[0], (to[1] - from[1]) * unit[1]];
  const length = Math.hypot(y, x), size = Math.min(3.2 * width + 2, length);
  if (length < 0.5) return null;
  const [uy, ux] = [y / length, x / length], tip = [to[0] * unit[0], to[1] * unit[1]];
  const at = (back, side) => [tip[1] - ux * back - uy * side, tip[0] - uy * back + ux * side];
  return [[tip[1], tip[0]], at(size, size / 2), at(size, -size / 2)];
}

// unit: pixels of a patch as [high, wide].
export function paint(context, ground, marks, meta, unit) {
  const [high, wide] = [meta.extent[0] * unit[0], meta.extent[1] * unit[1]];
  context.clearRect(0, 0, wide, high);
  if (ground) {
    context.imageSmoothingEnabled = true;
    context.drawImage(ground, 0, 0, wide, high);
  } else {
    context.fillStyle = "#777";
    context.fillRect(0, 0, wide, high);
  }
  for (const mark of marks) {
    context.globalAlpha = mark.opacity ?? 1;
    if (mark.type === "cells") {
      context.imageSmoothingEnabled = false;
      const image = cellCanvas(mark.colors, meta.rows, meta.cols);
      context.drawImage(image, 0, 0, meta.cols * unit[1], meta.rows * unit[0]);
      continue;
    }
    // A dark line below each coloured one: legible on any photograph.
    for (const [color, extra] of [["rgba(0,0,0,.75)", 2], [mark.color, 0]]) {
      context.strokeStyle = context.fillStyle = color;
      context.lineWidth = mark.width + extra;
      context.setLineDash(extra ? [] : mark.dash ?? []);
      context.beginPath();
      trace(context, mark, meta, unit);
    }
    context.setLineDash([]);
  }
  context.globalAlpha = 1;
}

// A box in pixels, [x, y, wide, high]: at the edge of the photograph its line stays inside.
function boxPixels({ box: [top, left, bottom, right], width }, meta, unit) {
  const inset = width / 2 + 1;
  const keep = (value, size) => Math.min(size - inset, Math.max(inset, value));
  const [high, wide] = [meta.extent[0] * unit[0], meta.extent[1] * unit[1]];
  const [x, y] = [keep(left * unit[1], wide), keep(top * unit[0], high)];
  return [x, y, keep(right * unit[1], wide) - x, keep(bottom * unit[0], high) - y];
}

function trace(context, mark, meta, unit) {
  if (mark.type === "box") {
    context.strokeRect(...boxPixels(mark, meta, unit));
  } else if (mark.type === "ellipse") {
    // Patches need not be square, so the ellipse is drawn in patches and the line in pixels.
    const line = context.getTransform();
    context.save();
    context.scale(unit[1], unit[0]);
    context.ellipse(mark.center[1], mark.center[0], ...mark.axes, mark.angle, 0, 2 * Math.PI);
    context.setTransform(line);
    context.stroke();
    context.restore();
  } else if (mark.type === "arrow") {
    const { from, to } = mark, tip = head(from, to, unit, mark.width);
    context.moveTo(from[1] * unit[1], from[0] * unit[0]);
    context.lineTo(to[1] * unit[1], to[0] * unit[0]);
    context.stroke();
    if (!tip) return;
    context.beginPath();
    for (const [x, y] of tip) context.lineTo(x, y);
    context.fill();
  }
}

const escaped = (text) =>
  String(text).replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
const short = (value) => Number(value.toFixed(2));

function markSvg(mark, meta, unit) {
  if (mark.type === "cells") {
    const href = cellCanvas(mark.colors, meta.rows, meta.cols).toDataURL();
    return `<image href="${href}" width="${short(meta.cols * unit[1])}" height="${short(meta.rows * unit[0])}" ` +
      'preserveAspectRatio="none" style="image-rendering:pixelated"/>';
  }
  const lines = [["#000", mark.width + 2, 0.75], [mark.color, mark.width, 1]];
  return lines.map(([color, width, opacity], k) => {
    const dash = k && mark.dash ? ` stroke-dasharray="${mark.dash}"` : "";
    const look = `fill="none" stroke="${color}" stroke-width="${width}" opacity="${short(opacity * mark.opacity)}"${dash}`;
    if (mark.type === "box") {
      const [x, y, wide, high] = boxPixels(mark, meta, unit).map(short);
      return `<rect x="${x}" y="${y}" width="${wide}" height="${high}" ${look}/>`;
    }
    if (mark.type === "ellipse") {
      const turn = (mark.angle * 180) / Math.PI;
      return `<ellipse rx="${short(mark.axes[0])}" ry="${short(mark.axes[1])}" vector-effect="non-scaling-stroke" ${look} ` +
        `transform="scale(${unit[1]} ${unit[0]}) translate(${mark.center[1]} ${mark.center[0]}) rotate(${turn})"/>`;
    }
    const { from, to } = mark, tip = head(from, to, unit, mark.width);
    const line = `<line x1="${short(from[1] * unit[1])}" y1="${short(from[0] * unit[0])}" ` +
      `x2="${short(to[1] * unit[1])}" y2="${short(to[0] * unit[0])}" ${look}/>`;
    if (!tip) return line;
    const points = tip.map(([x, y]) => `${short(x)},${short(y)}`).join(" ");
    return `${line}<polygon points="${points}" fill="${color}" stroke="${color}" stroke-width="${k ? 0 : 2}" ` +
      `opacity="${short(opacity * mark.opacity)}"/>`;
  }).join("");
}

function ticks(scale) {
  if (scale.log) {
    return [0, 1, 2, 3].map((k) => scale.low * (scale.high / scale.low) ** (k / 3));
  }
  return [0, 0.25, 0.5, 0.75, 1].map((share) => scale.low + share * (scale.high - scale.low));
}

const pictures = new WeakMap();

// The address of a picture of a colour table, which is made once.
function pictureOf(table, make) {
  if (!pictures.has(table)) pictures.set(table, make().toDataURL());
  return pictures.get(table);
}

function wheelPicture(table) {
  const size = 64, colors = new Uint8ClampedArray(4 * size * size);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const dy = (2 * (y + 0.5)) / size - 1, dx = (2 * (x + 0.5)) / size - 1;
      const at = 4 * (y * size + x), inside = size / 2 * (1 - Math.hypot(dy, dx));
      colors.set(wheelColor(table, dy, dx, 1), at);
      colors[at + 3] = 255 * Math.min(1, Math.max(0, inside));
    }
  }
  return cellCanvas(colors, size, size);
}

function barPicture(table) {
  const colors = new Uint8ClampedArray(4 * 256);
  for (let k = 0; k < 256; k++) {
    colors.set(table.subarray(3 * k, 3 * k + 3), 4 * k);
    colors[4 * k + 3] = 255;
  }
  return cellCanvas(colors, 1, 256);
}

// A colour bar or wheel as SVG of that width; returns {svg, height}.
export function legendSvg(legend, tables, width, ink) {
  const title = `<text x="0" y="13" font-weight="600">${escaped(legend.title)}` +
    `<tspan font-weight="400"> (${escaped(legend.unit)})</tspan></text>`;
  if (legend.words) {
    return { svg: `<g fill="${ink}">${title}<text y="33">${escaped(legend.words)}</text></g>`, height: 42 };
  }
  if (legend.wheel) {
    const size = 64, href = pictureOf(tables.wheel, () => wheelPicture(tables.wheel));
    const svg = `<g fill="${ink}">${title}<image href="${href}" y="20" width="${size}" height="${size}"/>` +
      `<text x="74" y="40">hue: where it points to,</text><text x="74" y="57">seen from the centre</text>` +
      `<text x="74" y="74">white: 0; rim: ${told(legend.wheel)} or more</text></g>`;
    return { svg, height: 92 };
  }
  const { scale } = legend, table = tables[legend.table];
  const href = pictureOf(table, () => barPicture(table));
  const bar = scale.beyond ? width - 12 : width;
  const last = table.subarray(3 * 255), color = `rgb(${last[0]},${last[1]},${last[2]})`;
  const more = scale.beyond
    ? `<polygon points="${bar},20 ${width},27 ${bar},34" fill="${color}"><title>some are higher</title></polygon>` : "";
  const shares = legend.unit.startsWith("share");
  const labels = ticks(scale).map((value, k, all) => {
    const x = (k / (all.length - 1)) * bar, anchor = k === 0 ? "start" : k === all.length - 1 ? "end" : "middle";
    const words = shares ? `${told(100 * value, 2)} %` : told(value, 2);
    return `<text x="${short(x)}" y="49" text-anchor="${anchor}">${escaped(words)}</text>`;
  }).join("");
  const svg = `<g fill="${ink}">${title}<image href="${href}" y="20" width="${bar}" height="14" preserveAspectRatio="none"/>${more}${labels}</g>`;
  return { svg, height: 58 };
}

// The whole picture for export: title, photograph with marks, scales.
export function sheetSvg({ title, subtitle, ground, marks, legends, tables, meta, unit }) {
  const [high, wide] = [meta.extent[0] * unit[0], meta.extent[1] * unit[1]];
  const margin = 16, ink = "#1b1f24", width = wide + 2 * margin;
  let y = 62, parts = "";
  const image = ground ? `<image href="${ground.toDataURL("image/png")}" width="${short(wide)}" height="${short(high)}" preserveAspectRatio="none"/>`
    : `<rect width="${short(wide)}" height="${short(high)}" fill="#777"/>`;
  parts += `<svg x="${margin}" y="${y}" width="${short(wide)}" height="${short(high)}">${image}` +
    `${marks.map((mark) => markSvg(mark, meta, unit)).join("")}</svg>`;
  y += high + 14;
  for (const legend of legends) {
    const drawn = legendSvg(legend, tables, wide, ink);
    parts += `<g transform="translate(${margin} ${short(y)})">${drawn.svg}</g>`;
    y += drawn.height + 8;
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${short(width)}" height="${short(y + 8)}" ` +
    `viewBox="0 0 ${short(width)} ${short(y + 8)}" font-family="system-ui, sans-serif" font-size="13">` +
    '<rect width="100%" height="100%" fill="#fff"/>' +
    `<text x="${margin}" y="26" font-size="16" font-weight="700" fill="${ink}">${escaped(title)}</text>` +
    `<text x="${margin}" y="46" fill="#5b6570">${escaped(subtitle)}</text>${parts}</svg>`;
}

export async function svgToPng(svg, scale = 2) {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg);
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
