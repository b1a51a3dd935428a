// Where one head of one layer looks, on demand.

import { HeatMap } from "./heat_map.js";
import { attention } from "./server.js";
import { count } from "./shown.js";

/**
 * Lets the user choose a layer and a head.
 *
 * @param {{layers, max_attention_tokens}} facts of the model.
 * @param {() => {id, text}[]} tokens so far.
 */
export function showAttentionOf(facts, tokens) {
  const [form, note] = ["#attention-request", "#attention-note"].map((selector) => document.querySelector(selector));
  const place = document.querySelector(".heat-map");
  const heatMap = new HeatMap(place.querySelector("canvas"), place.querySelector("#readout"));
  let looking = null; // the AbortController of the request under way

  function listHeads() {
    const { heads } = facts.layers[Number(form.layer.value)];
    form.head.replaceChildren(...Array.from({ length: heads }, (_, head) => new Option(head, head)));
  }

  async function show() {
    const all = tokens();
    if (!all.length) return;
    looking?.abort();
    looking = new AbortController();
    const [layer, head] = [Number(form.layer.value), Number(form.head.value)];
    const seen = all.slice(0, facts.max_attention_tokens);
    note.classList.remove("bad-text");
    note.textContent = "Computing…";
    try {
      const { weights, window } = await attention(seen.map((token) => token.id), layer, head, looking.signal);
      place.hidden = false;
      heatMap.show(weights, seen);
      const which = `${seen.length < all.length ? "the first " : ""}${count(seen.length, "token")}`;
      note.textContent = `Layer ${layer}, which attends to ${reach(window)}, head ${head}: ${which}. A row looks at the columns; the stronger the colour, the more.`;
    } catch (error) {
      if (error.name === "AbortError") return;
      note.classList.add("bad-text");
      note.textContent = error.message;
    }
  }

  form.layer.replaceChildren(...facts.layers.map(({ window }, layer) => new Option(`${layer} · ${reach(window)}`, layer)));
  listHeads();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    show();
  });
  form.layer.addEventListener("change", listHeads);
  form.addEventListener("change", () => place.hidden || show());
}

function reach(window) {
  return window === null ? "all tokens" : `the last ${window}`;
}
