// A prompt and the tokens that follow it, some of them chosen by the user.

import * as server from "./server.js";

export class Answer {
  /**
   * @param {{max_tokens, temperature, top_p, seed, candidates}} options of the request.
   * @param {() => void} changed is called after every token.
   */
  constructor(options, changed) {
    this.options = options;
    this.prompt = []; // {id, text}
    this.steps = []; // {id, text, logprob, candidates, timeMs, isFirst, isChosen}
    this.choices = []; // {step, id}
    this.changed = changed;
    this.ofPrompt = null; // a promise of [{logprob, candidates}], once somebody has asked
  }

  get tokens() {
    return [...this.prompt, ...this.steps];
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  /** Reads the prompt, makes the choices as the steps come to them, and goes on to the end. */
  async run(text, isChat, choices, signal) {
    this.prompt = await server.tokenize(text, isChat, signal);
    this.changed();
    for (const { step, id } of choices) {
      if (step >= this.options.max_tokens) break;
      await this.#goOn(step + 1, signal);
      if (this.steps.length <= step) return; // it has ended before
      await this.#take(step, id, signal);
    }
    await this.goOn(signal);
  }

  /** Puts another token in a step's place, forgets what followed, and goes on from there. */
  async choose(step, id, signal) {
    await this.#take(step, id, signal);
    await this.goOn(signal);
  }

  goOn(signal) {
    return this.#goOn(this.options.max_tokens, signal);
  }

  /** What the model expected at an index of `tokens`: {logprob, candidates}. */
  async expected(index) {
    if (index >= this.prompt.length) return this.steps[index - this.prompt.length];
    const ids = this.prompt.map((token) => token.id);
    this.ofPrompt ??= server.ofPrompt(ids, this.options.candidates);
    this.ofPrompt.catch(() => (this.ofPrompt = null)); // the next who asks tries again
    return (await this.ofPrompt)[index];
  }

  async #take(step, id, signal) {
    const { candidates } = this.steps[step];
    const known = candidates.find((candidate) => candidate.id === id);
    const token = known ?? { id, text: await server.textOf(id, signal), logprob: null };
    this.choices = [...this.choices.filter((choice) => choice.step < step), { step, id }];
    this.steps.length = step;
    this.steps.push({ ...token, candidates, timeMs: null, isFirst: false, isChosen: true });
    this.changed();
  }

  async #goOn(until, signal) {
    const left = until - this.steps.length;
    if (left <= 0) return;
    let before = performance.now();
    let isFirst = true; // its time has the prompt in it
    for await (const token of server.stream(this.ids, { ...this.options, max_tokens: left }, signal)) {
      const now = performance.now();
      this.steps.push({ ...token, timeMs: now - before, isFirst, isChosen: false });
      [before, isFirst] = [now, false];
      this.changed();
    }
  }
}

/** A token's logit less that of the best other candidate; null where it is not known. */
export function margin({ id, logprob, candidates }) {
  const other = candidates.find((candidate) => candidate.id !== id);
  return other && logprob !== null ? logprob - other.logprob : null;
}
