// What is drawn of each token: an option of the text, a row of the table, candidates to choose.

import { margin } from "./answer.js";
import { bar, element, number, percent, visible } from "./shown.js";

/** A token in the text; a step is null in the prompt. */
export function tokenOption(token, index, step) {
  const isPrompt = step === null;
  const kind = isPrompt ? "is-prompt" : token.isChosen ? "is-new is-chosen" : "is-new";
  const text = token.text.replaceAll("\n", "↵\n") || "∅";
  const properties = { className: `tok ${kind}`, textContent: text, tabIndex: -1, role: "option", "data-index": index };
  const shown = element("span", properties); // a button would not break across lines
  if (!isPrompt) shown.style.setProperty("--unlikely", token.logprob === null ? 1 : 1 - Math.exp(token.logprob));
  return shown;
}

/** A step in the table. */
export function stepRow(token, step) {
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

/** A candidate of a position in place of a token, likewise; a step is null in the prompt, where nothing can be chosen. */
export function candidateRow(candidate, rank, token, step) {
  const isTaken = candidate.id === token.id;
  const cells = [
    element("span", { className: "rank", textContent: rank }),
    element("span", { className: "token", textContent: visible(candidate.text) }),
    bar(candidate.logprob),
    element("span", { className: "share", textContent: percent(candidate.logprob) }),
  ];
  if (isTaken || step === null) return element("li", {}, element("span", { className: isTaken ? "row is-taken" : "row" }, ...cells));
  const title = `Go on with ${visible(candidate.text)} (id ${candidate.id})`;
  const properties = { type: "button", className: "row", title, "data-step": step, "data-id": candidate.id };
  return element("li", {}, element("button", properties, ...cells));
}
