// Numbers of one row: the adaptive window and the responsive field, as docs/method.md defines them.

export const TOLERANCE = 1e-6;

// Entries that sum to 1 (a row of zeros stays so), as `unit_rows` does.
export function unitRow(row) {
  let scale = 0;
  for (const value of row) if (value > scale) scale = value;
  if (!(scale > 0) || !Number.isFinite(scale)) return null;
  let total = 0;
  const unit = new Float64Array(row.length);
  for (let j = 0; j < row.length; j++) total += unit[j] = row[j] / scale;
  for (let j = 0; j < row.length; j++) unit[j] /= total;
  return unit;
}

// The smallest box [top, left, bottom, right] that holds `patch` and `coverage` of `row`.
export function smallestWindow(row, rows, cols, patch, coverage) {
  const r = Math.floor(patch / cols), c = patch % cols;
  const unit = unitRow(row);
  if (!unit) return [r, c, r + 1, c + 1];
  const wide = cols + 1;
  const sums = new Float64Array((rows + 1) * wide);
  for (let y = 0; y < rows; y++) {
    let line = 0;
    for (let x = 0; x < cols; x++) {
      line += unit[y * cols + x];
      sums[(y + 1) * wide + x + 1] = sums[y * wide + x + 1] + line;
    }
  }
  const mass = (top, left, bottom, right) =>
    sums[bottom * wide + right] - sums[top * wide + right] -
    sums[bottom * wide + left] + sums[top * wide + left];
  const wanted = coverage - TOLERANCE;
  let area = rows * cols;
  for (let top = 0; top <= r; top++) {
    for (let bottom = r + 1; bottom <= rows; bottom++) {
      const height = bottom - top;
      if (mass(top, 0, bottom, cols) < wanted) continue; // nor does any part of these rows
      // The further left a box begins, the sooner it may end: `right` only grows.
      for (let left = 0, right = c + 1; left <= c; left++) {
        while (right <= cols && mass(top, left, bottom, right) < wanted) right++;
        if (right > cols) break;
        area = Math.min(area, height * (right - left));
      }
    }
  }
  // Of that area: the largest mass, and of nearly equal ones the first.
  const found = [];
  let most = -1;
  for (let top = 0; top <= r; top++) {
    for (let left = 0; left <= c; left++) {
      for (let bottom = r + 1; bottom <= rows; bottom++) {
        const height = bottom - top, right = left + area / height;
        if (area % height || right <= c || right > cols) continue;
        const held = mass(top, left, bottom, right);
        if (held < wanted) continue;
        most = Math.max(most, held);
        found.push([held, [top, left, bottom, right]]);
      }
    }
  }
  const first = found.find(([held]) => held >= most - TOLERANCE);
  return first ? first[1] : [0, 0, rows, cols];
}

// Tendency, spread, ellipse and entropy of a row; null where it is zero.
export function field(row, rows, cols, patch) {
  const w = unitRow(row);
  if (!w) return null;
  const r = Math.floor(patch / cols), c = patch % cols;
  let y = 0, x = 0, square = 0, entropy = 0;
  for (let j = 0; j < w.length; j++) {
    const dy = Math.floor(j / cols) - r, dx = (j % cols) - c;
    y += w[j] * dy;
    x += w[j] * dx;
    square += w[j] * (dy * dy + dx * dx);
    if (w[j] > 0) entropy -= w[j] * Math.log(w[j]);
  }
  let yy = 0, xx = 0, xy = 0;
  for (let j = 0; j < w.length; j++) {
    const dy = Math.floor(j / cols) - r - y, dx = (j % cols) - c - x;
    yy += w[j] * dy * dy;
    xx += w[j] * dx * dx;
    xy += w[j] * dy * dx;
  }
  const middle = (xx + yy) / 2, half = Math.hypot((xx - yy) / 2, xy);
  return {
    tendency: [y, x],
    spread: Math.sqrt(square),
    axes: [Math.sqrt(middle + half), Math.sqrt(Math.max(0, middle - half))],
    angle: Math.atan2(2 * xy, xx - yy) / 2,
    entropy: w.length > 1 ? entropy / Math.log(w.length) : 0,
  };
}

// The mean displacement and spread of every row: [y, x, spread] for each patch, NaN where zero.
export function allTendencies(shares, rows, cols) {
  const patches = rows * cols;
  const found = new Float32Array(3 * patches).fill(NaN);
  for (let i = 0; i < patches; i++) {
    const r = Math.floor(i / cols), c = i % cols, base = i * patches;
    let y = 0, x = 0, square = 0, total = 0, j = 0;
    for (let row = 0; row < rows; row++) {
      const dy = row - r;
      for (let col = 0; col < cols; col++, j++) {
        const w = shares[base + j], dx = col - c;
        total += w;
        y += w * dy;
        x += w * dx;
        square += w * (dy * dy + dx * dx);
      }
    }
    if (total > 0) found.set([y, x, Math.sqrt(square)], 3 * i);
  }
  return found;
}

export function quantile(values, share) {
  const sorted = Float64Array.from(values).filter(Number.isFinite).sort(); // typed: by number, and fast
  if (!sorted.length) return NaN;
  const place = share * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

const written = new Intl.NumberFormat("en", { maximumFractionDigits: 8 }); // toLocaleString makes one at each call

// A number with three significant digits, as people write it.
export function told(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)) {
    return value.toExponential(digits - 1).replace("e", "·10^").replace("^+", "^");
  }
  return written.format(Number(value.toPrecision(digits)));
}

export const percent = (share) => `${told(100 * share)} %`;
