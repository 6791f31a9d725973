// Maps, decoded when they are first looked at. `load(key)` gives the bytes of a blob of pack.py.

const KEPT = 300e6; // bytes of decoded maps; the oldest go first

export function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const chars = atob(text), bytes = new Uint8Array(chars.length);
  for (let k = 0; k < chars.length; k++) bytes[k] = chars.charCodeAt(k);
  return bytes;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  try {
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Error("its data is damaged"); // Chromium's own words are "Failed to fetch"
  }
}

export class Maps {
  constructor(meta, load) {
    this.meta = meta;
    this.patches = meta.rows * meta.cols;
    this.load = load;
    this.kept = new Map();
  }

  // {shares: Float32Array [P, P], totals: Float64Array [P]}: rows that sum to 1, and their sums.
  map(image, indicator, layer) {
    return this.remember(`${image}/${indicator}/${layer}`, (bytes) => this.decode(bytes));
  }

  // Received impact over all layers, then in each: Float32Array [1 + L, P].
  impact(image, indicator) {
    return this.remember(`${image}/${indicator}/impact`, (bytes) => new Float32Array(bytes.buffer));
  }

  // Boxes that a window-free transformer predicts: Float32Array [W, G, P, 4].
  predicted(image) {
    return this.remember(`${image}/predicted`, (bytes) => new Float32Array(bytes.buffer));
  }

  // What is there already, without waiting.
  now(key) {
    const entry = this.kept.get(key);
    return entry && entry.value;
  }

  remember(key, decode) {
    const before = this.kept.get(key);
    if (before) {
      this.kept.delete(key); // and to the end: it was used last
      this.kept.set(key, before);
      return before.promise;
    }
    const entry = { value: null, size: 0 };
    entry.promise = (async () => {
      const bytes = await inflate(await this.load(key));
      entry.value = decode(bytes);
      entry.size = (entry.value.shares || entry.value).byteLength;
      this.forget();
      return entry.value;
    })();
    entry.promise.catch(() => this.kept.delete(key));
    this.kept.set(key, entry);
    return entry.promise;
  }

  forget() {
    let size = 0;
    for (const entry of this.kept.values()) size += entry.size;
    for (const [key, entry] of this.kept) {
      if (size <= KEPT) break;
      if (!entry.size) continue;
      size -= entry.size;
      this.kept.delete(key);
    }
  }

  decode(bytes) {
    const { patches } = this, wide = this.meta.bits === 16;
    const scale = new Float32Array(bytes.buffer, 0, patches);
    const first = 4 * patches, count = patches * patches, levels = wide ? 65535 : 255;
    const shares = new Float32Array(count), totals = new Float64Array(patches);
    const table = new Float64Array(levels + 1);
    for (let q = 0; q <= levels; q++) table[q] = (q / levels) * (q / levels);
    for (let i = 0; i < patches; i++) {
      const base = i * patches;
      let total = 0;
      for (let j = base; j < base + patches; j++) {
        const q = wide ? bytes[first + j] * 256 + bytes[first + count + j] : bytes[first + j];
        total += shares[j] = table[q] * scale[i]; // in float32, as dequantise in pack.py
      }
      totals[i] = total;
      for (let j = base; total > 0 && j < base + patches; j++) shares[j] /= total;
    }
    return { shares, totals };
  }
}
