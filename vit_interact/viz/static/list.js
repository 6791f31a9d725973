// The list of images, with its filters.

import { h, say } from "./dom.js";
import { percent, told } from "./numbers.js";

export const isWrong = (image) =>
  image.label !== null && image.guesses.length > 0 && image.guesses[0][0] !== image.label;

export function shownImages(meta, state) {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return meta.images.map((image, k) => [image, k]).filter(([image]) => {
    const text = [image.name, image.label ?? "", image.guesses[0]?.[0] ?? ""].join(" ").toLowerCase();
    return words.every((word) => text.includes(word)) && (!state.wrong || isWrong(image)) &&
      (!state.label || (image.label ?? image.guesses[0]?.[0]) === state.label);
  }).map(([, k]) => k);
}

// What is known beside the guess.
function labelAndScore({ label, score }) {
  return [label && `class: ${label}`, score !== null && `score: ${told(score)}`].filter(Boolean).join(", ");
}

// A path that is too long breaks after a folder first.
const breakable = (path) => path.split("/").flatMap((part, k) => (k ? ["/", h("wbr"), part] : [part]));

export function makeList(app) {
  const { meta } = app;
  const labels = [...new Set(meta.images.map((one) => one.label ?? one.guesses[0]?.[0]).filter(Boolean))];
  const search = h("input", { type: "search", placeholder: "find a name or class", "aria-label":
    "find images by name or class", oninput: (event) => app.set({ filter: event.target.value }) });
  const choose = h("select", { "aria-label": "class", onchange: (event) => app.set({ label: event.target.value }) },
    h("option", { value: "" }, "all classes"), labels.sort().map((name) => h("option", { value: name }, name)));
  const wrong = h("input", { type: "checkbox", onchange: (event) => app.set({ wrong: event.target.checked }) });
  const known = meta.images.some((image) => image.label !== null);
  const count = h("p", { class: "muted small", role: "status" });
  const items = meta.images.map((image, k) => h("li", {},
    h("button", { type: "button", class: "item", onclick: () => app.set({ image: k, pins: [], patch: null }) },
      image.picture ? h("img", { src: image.picture, alt: "", loading: "lazy" }) : h("span", { class: "blank" }),
      h("span", { class: "words" },
        h("span", { class: "name" }, breakable(image.name)),
        h("span", { class: isWrong(image) ? "guess wrong" : "guess" },
          image.guesses.length ? `${image.guesses[0][0]}, ${percent(image.guesses[0][1])}` : "no classes"),
        labelAndScore(image) ? h("span", { class: "guess" }, labelAndScore(image)) : null))));
  const list = h("ul", { class: "items" }, items);
  const element = h("section", { class: "panel images", "aria-label": "images" },
    meta.images.length > 1 ? h("div", { class: "filters" }, search, labels.length > 1 ? choose : null,
      known ? h("label", { class: "check" }, wrong, " wrong predictions only") : null) : null,
    count, list);
  let last = 0;
  return { element, draw({ state }) {
    const shown = new Set(shownImages(meta, state));
    items.forEach((item, k) => {
      item.hidden = !shown.has(k);
      item.firstChild.setAttribute("aria-current", k === state.image ? "true" : "false");
    });
    if (state.image !== last) reveal(items[last = state.image], element, list);
    say(count, shown.size === meta.images.length ? `${shown.size} image${shown.size === 1 ? "" : "s"}`
      : shown.size ? `${shown.size} of ${meta.images.length} images` : "no image fits these filters");
    if (search.value !== state.filter) search.value = state.filter;
    if (choose.value !== state.label) choose.value = state.label;
    wrong.checked = state.wrong;
  } };
}

// Scrolls an item into its list, which is a column or, on a phone, a row; never the page.
function reveal(item, ...scrollers) {
  for (const scroller of scrollers) {
    const place = item.getBoundingClientRect(), frame = scroller.getBoundingClientRect();
    const by = (low, high, from, to) => (low < from ? low - from : Math.max(0, Math.min(high - to, low - from)));
    scroller.scrollTop += by(place.top, place.bottom, frame.top, frame.bottom);
    scroller.scrollLeft += by(place.left, place.right, frame.left, frame.right);
  }
}
