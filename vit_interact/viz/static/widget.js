// The viewer in notebooks, as anywidget wants it.

import { mount } from "./view.js";

const NAMES = ["image", "indicator", "layer", "patch"];

const viewLayer = (layer) => (layer === "mean" ? "all" : layer);

export default {
  render({ model, el }) {
    // Maps come when they are looked at: a notebook must not hold what nobody has asked for.
    const waiting = new Map();
    const take = (message, buffers) => {
      const found = waiting.get(message.key);
      if (!found) return;
      waiting.delete(message.key);
      if (message.error) found.reject(new Error(message.error));
      else {
        const view = buffers[0];
        found.resolve(new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength));
      }
    };
    model.on("msg:custom", take);
    const load = (key) => new Promise((resolve, reject) => {
      waiting.set(key, { resolve, reject });
      model.send({ key });
    });
    const body = document.body;
    const light = body.dataset.jpThemeLight ??
      (body.classList.contains("vscode-dark") ? "false" : body.classList.contains("vscode-light") ? "true" : undefined);
    const theme = light === undefined ? undefined : light === "true" ? "light" : "dark";
    let told = {};
    const onchange = (state) => {
      const now = { image: state.image, indicator: state.indicator, layer: state.layer === "all" ? "mean" : state.layer,
                    patch: state.pins[0] ?? state.patch, pins: state.pins };
      const changed = [...NAMES, "pins"].filter((name) => JSON.stringify(now[name]) !== JSON.stringify(told[name]));
      if (!changed.length) return;
      told = now;
      for (const name of changed) model.set(name, now[name]);
      clearTimeout(model.saving);
      model.saving = setTimeout(() => model.save_changes(), 60);
    };
    // What was chosen in Python before there was a view.
    const first = { image: model.get("image"), indicator: model.get("indicator"), layer: viewLayer(model.get("layer")) };
    const patch = model.get("patch");
    if (patch !== null) Object.assign(first, { patch, pins: [patch] });
    const app = mount(el, model.get("_meta"), load,
      { css: model.get("_css"), results: model.get("_results"), theme, onchange, first });
    const listen = () => {
      const wanted = Object.fromEntries(NAMES.map((name) => [name, model.get(name)]));
      const changes = {};
      if (wanted.image !== told.image) Object.assign(changes, { image: wanted.image, pins: [], patch: null });
      if (wanted.indicator !== told.indicator) changes.indicator = wanted.indicator;
      if (wanted.layer !== told.layer) changes.layer = viewLayer(wanted.layer);
      if (wanted.patch !== told.patch && wanted.patch !== null) Object.assign(changes, { patch: wanted.patch, pins: [wanted.patch] });
      if (Object.keys(changes).length) app.set(changes);
    };
    for (const name of NAMES) model.on(`change:${name}`, listen);
    return () => {
      model.off("msg:custom", take);
      for (const name of NAMES) model.off(`change:${name}`, listen);
    };
  },
};
