// The attention of one head: a row for each token, a column for each that it may look at.

import { visible } from "./shown.js";

const LEAST_LABELLED = 13; // pixels of a cell that has room for a token's text
const LABEL = 88; // pixels
const [MOST_CELL, MOST_SIDE] = [22, 720]; // pixels
const SHOWN = 5; // of the tokens that a row looks at

export class HeatMap {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLElement} readout says in words what is under the pointer or the keys.
   */
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    this.weights = [];
    this.cell = { row: 0, column: 0 };
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Shows weights, [query][key], of tokens {text}. */
  show(weights, tokens) {
    this.weights = weights;
    this.tokens = tokens;
    this.cell = { row: weights.length - 1, column: 0 };
    this.draw();
    this.#tell();
  }

  draw() {
    const count = this.weights.length;
    const width = Math.min(MOST_SIDE, this.canvas.parentElement.clientWidth);
    if (!count || !width) return;
    const labelled = Math.min(MOST_CELL, (width - LABEL) / count);
    this.label = labelled >= LEAST_LABELLED ? LABEL : 0;
    this.size = this.label ? labelled : Math.min(MOST_CELL, width / count);
    const side = this.label + this.size * count;
    const ratio = devicePixelRatio;
    Object.assign(this.canvas, { width: Math.round(side * ratio), height: Math.round(side * ratio) });
    this.canvas.style.width = this.canvas.style.height = `${side}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.canvas);
    const [ink, mark, muted] = ["--c0", "--c1", "--muted"].map((name) => style.getPropertyValue(name));
    context.fillStyle = ink;
    this.weights.forEach((row, at) =>
      row.forEach((weight, column) => {
        context.globalAlpha = Math.sqrt(weight); // so that small weights are seen
        context.fillRect(this.label + column * this.size, this.label + at * this.size, this.size, this.size);
      }),
    );
    context.globalAlpha = 1;
    context.strokeStyle = context.fillStyle = muted;
    context.lineWidth = 0.5;
    context.beginPath(); // the diagonal's steps: what lies beyond comes later in the text
    for (let at = 0; at < count; at++) {
      const [x, y] = [this.label + at * this.size, this.label + at * this.size];
      context.moveTo(x, y);
      context.lineTo(x + this.size, y);
      context.lineTo(x + this.size, y + this.size);
    }
    context.stroke();
    if (this.label) this.#drawLabels(context, style);
    const { row, column } = this.cell;
    context.strokeStyle = mark;
    context.lineWidth = 1;
    context.strokeRect(this.label, this.label + row * this.size, (row + 1) * this.size, this.size);
    context.lineWidth = 2;
    context.strokeRect(this.label + column * this.size, this.label + row * this.size, this.size, this.size);
  }

  #drawLabels(context, style) {
    context.font = `${Math.min(12, this.size * 0.8)}px ${style.fontFamily}`;
    context.textBaseline = "middle";
    const most = Math.floor((LABEL - 8) / (Math.min(12, this.size * 0.8) * 0.62));
    this.tokens.slice(0, this.weights.length).forEach(({ text }, at) => {
      const shown = visible(text);
      const label = [...shown].length > most ? `${[...shown].slice(0, most - 1).join("")}…` : shown;
      const middle = LABEL + (at + 0.5) * this.size;
      context.textAlign = "right";
      context.fillText(label, LABEL - 6, middle);
      context.save();
      context.translate(middle, LABEL - 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(label, 0, 0);
      context.restore();
    });
  }

  #point(event) {
    const at = (offset) => Math.floor((offset - this.label) / this.size);
    this.#go(at(event.offsetY), at(event.offsetX));
  }

  #key(event) {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    this.#go(this.cell.row + down, this.cell.column + right);
  }

  #go(row, column) {
    const last = this.weights.length - 1;
    row = Math.max(0, Math.min(last, row));
    column = Math.max(0, Math.min(row, column));
    if (row === this.cell.row && column === this.cell.column) return;
    this.cell = { row, column };
    this.draw();
    this.#tell();
  }

  #tell() {
    const { row, column } = this.cell;
    const named = (at) => `${visible(this.tokens[at].text)} (${at})`;
    const share = (weight) => `${(100 * weight).toFixed(1)} %`;
    const likeliest = this.weights[row].map((weight, at) => ({ weight, at })).sort((one, other) => other.weight - one.weight);
    const most = likeliest.slice(0, SHOWN).map(({ weight, at }) => `${named(at)} ${share(weight)}`);
    this.readout.textContent = `${named(row)} looks at ${named(column)}: ${share(this.weights[row][column])}. Most of all at ${most.join(", ")}.`;
  }
}
