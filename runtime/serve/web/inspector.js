// The page: a form, the tokens as they come, a position's candidates, and one head's attention.

import { Answer, margin } from "./answer.js";
import { showAttentionOf } from "./attention.js";
import { askForKey } from "./key_dialog.js";
import { fieldsOf, fragmentOf, fromFragment } from "./link.js";
import { candidateRow, stepRow, tokenOption } from "./rows.js";
import * as server from "./server.js";
import { count, element, number, percent, visible } from "./shown.js";

const at = (selector) => document.querySelector(selector);
const form = at("#request");

let answer = null;
let asked = null; // the form's fields as they were for it
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

// Requests

async function run(choices) {
  const data = new FormData(form);
  const options = Object.fromEntries(
    ["max_tokens", "temperature", "top_p", "seed", "candidates"].map((name) => [name, Number(data.get(name))]),
  );
  asked = fieldsOf(form);
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
  at("#run").disabled = true;
  at("#stop").disabled = false;
  at("#error").textContent = "";
  at("#status").textContent = "Running…";
  saveLink();
  let said = "";
  try {
    await request(own.signal);
    said = summary();
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

function summary() {
  const { prompt, steps, options } = answer;
  const decoded = steps.filter((step) => step.timeMs !== null && !step.isFirst);
  const tookMs = decoded.reduce((sum, step) => sum + step.timeMs, 0);
  const first = steps[0]?.isFirst ? `, the first after ${steps[0].timeMs.toFixed(0)} ms` : "";
  const rate = tookMs > 0 ? `, then ${((1e3 * decoded.length) / tookMs).toFixed(1)} a second` : "";
  const end = steps.length < options.max_tokens ? " The model ended it." : "";
  return `${count(steps.length, "token")} after a prompt of ${prompt.length}${first}${rate}.${end}`;
}

function saveLink() {
  history.replaceState(null, "", fragmentOf(asked ?? fieldsOf(form), answer?.choices ?? []));
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
    const step = index < answer.prompt.length ? null : index - answer.prompt.length;
    tokens.append(tokenOption(all[index], index, step));
    if (step !== null) rows.append(stepRow(all[index], step));
  }
  shownTokens = all;
  if (wantsFocus && current < all.length) {
    wantsFocus = false;
    tokens.children[current].focus();
  }
  if (current === null) at("#steps").parentElement.scrollTop = 1e9; // to the newest
  mark();
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
  const step = index < answer.prompt.length ? null : index - answer.prompt.length;
  at("#position-title").replaceChildren("Position ", String(index), ": ", element("bdi", { className: "token", textContent: visible(token.text) }));
  const where = step === null ? "of the prompt" : `step ${step + 1}`;
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
    : step === null
      ? "What the model expected here."
      : "What the model expected here. Choose another, and it goes on from there.";
  at("#position-body").replaceChildren(
    element("p", { className: "quiet", textContent: facts.join(" · ") }),
    element("ol", { className: "ranked" }, ...rows),
    element("p", { className: "quiet", textContent: said }),
  );
}

// The beginning

/** Shows what the address asks for. */
function open() {
  const choices = fromFragment(location.hash, form);
  if (choices && form.reportValidity()) run(choices);
}

server.onKeyWanted(askForKey);
try {
  const facts = await server.facts();
  const { model, family, parameters, dtype, device, layers, max_model_len: context } = facts;
  const heads = new Set(layers.map((layer) => layer.heads)).size === 1 ? ` of ${count(layers[0].heads, "head")}` : "";
  const shown = [model, family, `${parameters.toLocaleString("en")} parameters`, `${dtype} on ${device}`];
  at("#facts").textContent = [...shown, `${count(layers.length, "layer")}${heads}`, `context ${context.toLocaleString("en")}`].join(" · ");
  document.title = `${model} · inspector`;
  form.chat.closest("label").hidden = !facts.has_chat_template;
  showAttentionOf(facts, () => answer?.tokens ?? []);
  open();
} catch (error) {
  at("#error").textContent = error.message;
}
