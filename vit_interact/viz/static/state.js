// What is shown, and how it is written into the address of the page.

export const OVERLAYS = {
  taken: { label: "impact on the chosen patch", opacity: 0.75, on: true },
  given: { label: "impact of the chosen patch", opacity: 0.75, on: false },
  window: { label: "adaptive window", opacity: 1, on: true },
  predicted: { label: "predicted window", opacity: 1, on: true },
  arrow: { label: "field: arrow", opacity: 1, on: true },
  ellipse: { label: "field: ellipse", opacity: 1, on: false },
  received: { label: "received impact", opacity: 0.75, on: false, whole: true },
  arrows: { label: "arrows of all patches", opacity: 0.9, on: false, whole: true },
  wheel: { label: "directions by colour", opacity: 0.7, on: false, whole: true },
};

export function firstState(meta) {
  return {
    tab: "images",
    image: 0,
    indicator: meta.indicators[0].name,
    layer: "all",
    patch: null,
    pins: [],
    coverage: meta.coverage,
    log: false,
    removed: 0,
    on: Object.fromEntries(Object.entries(OVERLAYS).map(([name, one]) => [name, one.on])),
    opacity: Object.fromEntries(Object.entries(OVERLAYS).map(([name, one]) => [name, one.opacity])),
    filter: "",
    wrong: false,
    label: "",
  };
}

const NUMBERS = { image: [0, 1e9], coverage: [0.01, 1], removed: [0, 0.95] };

export function toHash(state, meta) {
  const first = firstState(meta), parts = new URLSearchParams();
  for (const key of ["tab", "image", "indicator", "layer", "coverage", "removed", "filter", "label"]) {
    if (state[key] !== first[key]) parts.set(key, state[key]);
  }
  for (const key of ["log", "wrong"]) if (state[key]) parts.set(key, "1");
  const cols = meta.cols;
  const place = (patch) => `${Math.floor(patch / cols)}.${patch % cols}`;
  if (state.patch !== null && !state.pins.includes(state.patch)) parts.set("patch", place(state.patch));
  if (state.pins.length) parts.set("pins", state.pins.map(place).join(","));
  const differ = Object.keys(OVERLAYS).filter(
    (name) => state.on[name] !== first.on[name] || state.opacity[name] !== first.opacity[name]);
  if (differ.length) {
    parts.set("show", differ.map(
      (name) => `${state.on[name] ? "" : "-"}${name}:${state.opacity[name]}`).join(","));
  }
  return parts.toString();
}

// Anything that is not understood is left as it is at first: addresses are typed and cut.
export function fromHash(text, meta) {
  const state = firstState(meta), parts = new URLSearchParams(text.replace(/^#/, ""));
  const place = (written) => {
    const [row, col] = written.split(".").map(Number);
    const inside = row >= 0 && row < meta.rows && col >= 0 && col < meta.cols;
    return inside && Number.isInteger(row) && Number.isInteger(col) ? row * meta.cols + col : null;
  };
  for (const [key, [low, high]] of Object.entries(NUMBERS)) {
    const value = parts.has(key) ? Number(parts.get(key)) : NaN;
    if (Number.isFinite(value)) state[key] = Math.min(high, Math.max(low, value));
  }
  state.image = Math.min(meta.images.length - 1, Math.floor(state.image));
  const names = meta.indicators.map((one) => one.name);
  if (names.includes(parts.get("indicator"))) state.indicator = parts.get("indicator");
  const layer = Number(parts.get("layer") ?? NaN);
  if (meta.layers.includes(layer)) state.layer = layer;
  for (const key of ["tab", "filter", "label"]) if (parts.has(key)) state[key] = parts.get(key);
  for (const key of ["log", "wrong"]) state[key] = parts.get(key) === "1";
  state.pins = (parts.get("pins") ?? "").split(",").map(place).filter((patch) => patch !== null);
  state.pins = [...new Set(state.pins)].slice(0, 2);
  state.patch = state.pins[0] ?? (parts.has("patch") ? place(parts.get("patch")) : null);
  for (const written of (parts.get("show") ?? "").split(",")) {
    const [name, opacity] = written.replace(/^-/, "").split(":");
    if (!Object.hasOwn(OVERLAYS, name)) continue;
    state.on[name] = !written.startsWith("-");
    const value = Number(opacity);
    if (opacity !== undefined && value >= 0 && value <= 1) state.opacity[name] = value;
  }
  return state;
}
