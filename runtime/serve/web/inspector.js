// The page: a form, the tokens as they come, a position's candidates, and one head's attention.

import { Answer, margin } from "./answer.js";
import { HeatMap } from "./heat_map.js";
import { fragmentOf, fromFragment } from "./link.js";
import * as server from "./server.js";
import { bar, element, number, percent, visible } from "./shown.js";

const at = (selector) => document.querySelector(selector);
const form = at("#request");
const heatMap = new HeatMap(at("canvas"), at("#readout"));

let facts = null;
let answer = null;
let running = null; // the AbortController of the request under way
let current = null; // index of the token that is looked at; null for the newest
let shownTokens = []; // of the answer, as they are drawn
let wantsFocus = false; // whether the current token is to have the focus, once it is there

// What the user does

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run([]);
});
at("#stop").addEventListener("click", stop);
at("#copy").addEventListener("click", copyLink);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.contains(event.target)) form.requestSubmit();
  if (event.key === "Escape" && running) stop();
});
addEventListener("hashchange", open);

const tokens = at("#tokens");
tokens.addEventListener("pointerover", (event) => lookAt(indexOf(event.target)));
tokens.addEventListener("focusin", (event) => lookAt(indexOf(event.target)));
tokens.addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault(); // or the button that has the focus now would take the key too
    at("#position button")?.focus();
  }
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const index = Math.max(0, Math.min(shownTokens.length - 1, indexOf(event.target) + step));
  tokens.children[index].focus();
});

for (const place of [at("#steps"), at("#position")]) {
  place.addEventListener("click", (event) => {
    const { step, id } = event.target.closest("button[data-id]")?.dataset ?? {};
    if (id === undefined) return;
    choose(Number(step), Number(id));
    if (event.detail === 0) wantsFocus = true; // by the keyboard, whose place is redrawn
  });
}
at("#steps").addEventListener("pointerover", (event) => {
  const row = event.target.closest("tbody tr");
  if (row) lookAt(answer.prompt.length + row.sectionRowIndex);
});

const attentionForm = at("#attention-request");
attentionForm.addEventListener("submit", (event) => {
  event.preventDefault();
  showAttention();
});
attentionForm.layer.addEventListener("change", listHeads);
attentionForm.addEventListener("change", () => heatMap.weights.length && showAttention());

// Requests

async function run(choices) {
  const data = new FormData(form);
  const options = Object.fromEntries(
    ["max_tokens", "temperature", "top_p", "seed", "candidates"].map((name) => [name, Number(data.get(name))]),
  );
  answer = new Answer(options, update);
  answer.choices = choices; // until they have been made, for the link
  current = null;
  const [text, isChat] = [data.get("prompt"), data.has("chat")];
  await under((signal) => answer.run(text, isChat, choices, signal));
}

async function choose(step, id) {
  const made = answer;
  current = made.prompt.length + step;
  await under((signal) => made.choose(step, id, signal));
}

/** Runs something of the answer's as the one request under way, and says what came of it. */
async function under(request) {
  running?.abort();
  const own = (running = new AbortController());
  const began = performance.now();
  const before = answer.steps.length;
  at("#run").disabled = true;
  at("#stop").disabled = false;
  at("#error").textContent = "";
  at("#status").textContent = "Running…";
  saveLink();
  let said = "";
  try {
    await request(own.signal);
    said = summary(performance.now() - began);
  } catch (error) {
    if (own !== running) return; // another has taken its place
    if (error.name === "AbortError") said = `Stopped after ${count(answer.steps.length, "token")}.`;
    else at("#error").textContent = error.message;
  }
  if (own !== running) return;
  running = null;
  at("#run").disabled = false;
  at("#stop").disabled = true;
  at("#status").textContent = said;
  saveLink();
  update();
}

function stop() {
  running?.abort();
}

function summary(tookMs) {
  const timed = answer.steps.filter((step) => step.timeMs !== null);
  const later = timed.slice(1).reduce((sum, step) => sum + step.timeMs, 0);
  const rate = timed.length > 1 && later > 0 ? `, ${((1e3 * (timed.length - 1)) / later).toFixed(1)} tokens/s` : "";
  const end = answer.steps.length < answer.options.max_tokens ? " The model ended it." : "";
  return `${count(answer.steps.length, "token")} after a prompt of ${answer.prompt.length}, in ${(tookMs / 1e3).toFixed(2)} s${rate}.${end}`;
}

function count(many, what) {
  return `${many} ${what}${many === 1 ? "" : "s"}`;
}

function saveLink() {
  history.replaceState(null, "", fragmentOf(form, answer?.choices ?? []));
}

async function copyLink() {
  saveLink();
  try {
    await navigator.clipboard.writeText(location.href);
    at("#status").textContent = "Copied.";
  } catch {
    at("#status").textContent = "The link is in the address bar: this browser lets no page copy it.";
  }
}

// The tokens

/** Draws what is new of the answer, and nothing else. */
function update() {
  at("#answer").hidden = at("#attention").hidden = !answer.prompt.length;
  const all = answer.tokens;
  const same = all.findIndex((token, index) => token !== shownTokens[index]);
  const kept = same < 0 ? Math.min(all.length, shownTokens.length) : same;
  const rows = at("#steps tbody");
  while (tokens.children.length > kept) tokens.lastChild.remove();
  while (rows.children.length > Math.max(0, kept - answer.prompt.length)) rows.lastChild.remove();
  for (let index = kept; index < all.length; index++) {
    tokens.append(tokenOption(all[index], index));
    if (index >= answer.prompt.length) rows.append(stepRow(all[index], index - answer.prompt.length));
  }
  shownTokens = all;
  if (wantsFocus && current < all.length) {
    wantsFocus = false;
    tokens.children[current].focus();
  }
  if (current === null) at("#steps").parentElement.scrollTop = 1e9; // to the newest
  mark();
}

function tokenOption(token, index) {
  const isPrompt = index < answer.prompt.length;
  const kind = isPrompt ? "is-prompt" : token.isChosen ? "is-new is-chosen" : "is-new";
  const text = token.text.replaceAll("\n", "↵\n") || "∅";
  const properties = { className: `tok ${kind}`, textContent: text, tabIndex: -1, role: "option", "data-index": index };
  const shown = element("span", properties); // a button would not break across lines
  if (!isPrompt) shown.style.setProperty("--unlikely", token.logprob === null ? 1 : 1 - Math.exp(token.logprob));
  return shown;
}

function stepRow(token, step) {
  const chosen = token.isChosen ? [" ", element("span", { className: "badge", textContent: "chosen" })] : [];
  const cells = [
    element("th", { scope: "row", textContent: step + 1 }),
    element("td", { className: "token" }, visible(token.text), ...chosen),
    element("td", { className: "id", textContent: token.id }),
    element("td", { className: "probability" }, bar(token.logprob), ` ${percent(token.logprob)}`),
    element("td", { className: "margin", textContent: number(margin(token), 2) }),
    element("td", { className: "time", textContent: token.timeMs === null ? "–" : `${number(token.timeMs, 1)} ms` }),
    element("td", { className: "candidates" }, ...token.candidates.map((candidate) => chip(candidate, token, step))),
  ];
  return element("tr", {}, ...cells);
}

/** A candidate as a button that goes on from it, unless it is the one that was taken. */
function chip(candidate, token, step) {
  const isTaken = candidate.id === token.id;
  const text = [element("span", { className: "token", textContent: visible(candidate.text) }), ` ${percent(candidate.logprob)}`];
  if (isTaken) return element("span", { className: "chip is-taken" }, ...text);
  const title = `Step ${step + 1}: go on with ${visible(candidate.text)} (id ${candidate.id})`;
  return element("button", { type: "button", className: "chip", title, "data-step": step, "data-id": candidate.id }, ...text);
}

function indexOf(target) {
  const token = target.closest?.("[data-index]");
  return token ? Number(token.dataset.index) : null;
}

function lookAt(index) {
  if (index === null || index === current) return;
  current = index;
  mark();
}

/** Marks the token that is looked at, and shows what the model expected in its place. */
async function mark() {
  const index = Math.min(current ?? Infinity, shownTokens.length - 1);
  if (index < 0) return;
  for (const before of tokens.querySelectorAll("[aria-selected]")) {
    before.removeAttribute("aria-selected");
    before.tabIndex = -1;
  }
  tokens.children[index].setAttribute("aria-selected", "true");
  tokens.children[index].tabIndex = 0;
  const [of, token] = [answer, shownTokens[index]];
  if (position.token !== token) showPosition(token, index, null);
  try {
    const expected = await of.expected(index);
    if (token === position.token && expected) showPosition(token, index, expected);
  } catch (error) {
    if (token === position.token) at("#position-body").replaceChildren(element("p", { className: "bad-text", textContent: error.message }));
  }
}

const position = { token: null, expected: undefined };

function showPosition(token, index, expected) {
  if (position.token === token && position.expected === expected) return;
  Object.assign(position, { token, expected });
  const step = index - answer.prompt.length;
  at("#position-title").replaceChildren("Position ", String(index), ": ", element("bdi", { className: "token", textContent: visible(token.text) }));
  const where = step < 0 ? "of the prompt" : `step ${step + 1}`;
  const facts = [`id ${token.id}`, where];
  if (!expected) {
    at("#position-body").replaceChildren(element("p", { className: "quiet", textContent: `${facts.join(" · ")} · …` }));
    return;
  }
  const { logprob, candidates } = expected;
  if (logprob !== null) facts.push(percent(logprob), `margin ${number(margin({ ...token, logprob, candidates }), 2)}`);
  const rows = candidates.map((candidate, rank) => candidateRow(candidate, rank + 1, token, step));
  if (candidates.length && !candidates.some((candidate) => candidate.id === token.id)) {
    rows.push(candidateRow({ ...token, logprob }, "–", token, step)); // it was none of the likeliest
  }
  const said = !candidates.length
    ? "The first token follows nothing: the model expected nothing in its place."
    : step < 0
      ? "What the model expected here."
      : "What the model expected here. Choose another, and it goes on from there.";
  at("#position-body").replaceChildren(
    element("p", { className: "quiet", textContent: facts.join(" · ") }),
    element("ol", { className: "ranked" }, ...rows),
    element("p", { className: "quiet", textContent: said }),
  );
}

function candidateRow(candidate, rank, token, step) {
  const isTaken = candidate.id === token.id;
  const cells = [
    element("span", { className: "rank", textContent: rank }),
    element("span", { className: "token", textContent: visible(candidate.text) }),
    bar(candidate.logprob),
    element("span", { className: "share", textContent: percent(candidate.logprob) }),
  ];
  if (isTaken || step < 0) return element("li", {}, element("span", { className: isTaken ? "row is-taken" : "row" }, ...cells));
  const title = `Go on with ${visible(candidate.text)} (id ${candidate.id})`;
  const properties = { type: "button", className: "row", title, "data-step": step, "data-id": candidate.id };
  return element("li", {}, element("button", properties, ...cells));
}

// Attention

function listLayers() {
  const names = facts.layers.map(({ window }, layer) => `${layer} · ${window === null ? "all tokens" : `the last ${window}`}`);
  attentionForm.layer.replaceChildren(...names.map((name, layer) => new Option(name, layer)));
  listHeads();
}

function listHeads() {
  const { heads } = facts.layers[Number(attentionForm.layer.value)];
  attentionForm.head.replaceChildren(...Array.from({ length: heads }, (_, head) => new Option(head, head)));
}

let looking = null;

async function showAttention() {
  if (!answer?.prompt.length) return;
  looking?.abort();
  const own = (looking = new AbortController());
  const [layer, head] = [Number(attentionForm.layer.value), Number(attentionForm.head.value)];
  const seen = answer.tokens.slice(0, facts.max_attention_tokens);
  const note = at("#attention-note");
  note.classList.remove("bad-text");
  note.textContent = "Computing…";
  try {
    const { weights, window } = await server.attention(seen.map((token) => token.id), layer, head, own.signal);
    at(".heat-map").hidden = false;
    heatMap.show(weights, seen);
    const reach = window === null ? "all tokens" : `the last ${window} tokens`;
    const first = seen.length < answer.tokens.length ? "the first " : "";
    note.textContent = `Layer ${layer}, which attends to ${reach}, head ${head}: ${first}${count(seen.length, "token")}. A row looks at the columns; the stronger the colour, the more.`;
  } catch (error) {
    if (error.name === "AbortError") return;
    note.classList.add("bad-text");
    note.textContent = error.message;
  }
}

// The beginning

function askForKey(wasWrong) {
  const dialog = at("#key");
  dialog.querySelector(".bad-text").hidden = !wasWrong;
  const keyForm = dialog.querySelector("form");
  dialog.showModal();
  return new Promise((resolve) => {
    let given = null;
    keyForm.onsubmit = (event) => {
      event.preventDefault();
      given = keyForm.key.value;
      dialog.close();
    };
    dialog.querySelector(".cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      keyForm.reset();
      resolve(given);
    };
  });
}

/** Shows what the address asks for. */
function open() {
  const choices = fromFragment(location.hash, form);
  if (choices && form.reportValidity()) run(choices);
}

server.onKeyWanted(askForKey);
try {
  facts = await server.facts();
  const { model, family, parameters, dtype, device, layers, max_model_len: context } = facts;
  const heads = new Set(layers.map((layer) => layer.heads)).size === 1 ? ` of ${count(layers[0].heads, "head")}` : "";
  const shown = [model, family, `${parameters.toLocaleString("en")} parameters`, `${dtype} on ${device}`];
  at("#facts").textContent = [...shown, `${count(layers.length, "layer")}${heads}`, `context ${context.toLocaleString("en")}`].join(" · ");
  document.title = `${model} · inspector`;
  form.chat.closest("label").hidden = !facts.has_chat_template;
  listLayers();
  open();
} catch (error) {
  at("#error").textContent = error.message;
}
