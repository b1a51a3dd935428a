// How tokens and numbers are written.

const VISIBLE = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };

/** A token's text with its spaces and line breaks visible. */
export function visible(text) {
  return text === "" ? "∅" : text.replace(/[ \n\t\r]/g, (character) => VISIBLE[character]);
}

export function percent(logprob) {
  return logprob === null ? "–" : `${(100 * Math.exp(logprob)).toFixed(logprob > Math.log(0.0995) ? 1 : 2)} %`;
}

export function number(value, digits) {
  return value === null ? "–" : value.toFixed(digits).replace("-", "−");
}

export function count(many, what) {
  return `${many} ${what}${many === 1 ? "" : "s"}`;
}

/** An element with properties and children. A property that begins with "data-", "aria-" or "role" is an attribute. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (/^(data-|aria-|role$)/.test(property)) made.setAttribute(property, value);
    else made[property] = value;
  }
  made.append(...children);
  return made;
}

/** A bar of a probability. */
export function bar(logprob) {
  const fill = element("i");
  fill.style.width = `${logprob === null ? 0 : 100 * Math.exp(logprob)}%`; // by the CSSOM, which the page's policy allows
  return element("span", { className: "meter", "aria-hidden": "true" }, fill);
}
