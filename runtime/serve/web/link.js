// A request as a link: everything is behind the #, which no browser sends to any server.

/** A form's fields as parameters. */
export function fieldsOf(form) {
  const parameters = new URLSearchParams();
  for (const field of named(form)) {
    if (field.type !== "checkbox") parameters.set(field.name, field.value);
    else if (field.checked) parameters.set(field.name, "1");
  }
  return parameters;
}

/** The fragment of such parameters and of the choices made since: [{step, id}]. */
export function fragmentOf(fields, choices) {
  const parameters = new URLSearchParams(fields);
  if (choices.length) parameters.set("choices", choices.map(({ step, id }) => `${step}:${id}`).join(" "));
  return `#${parameters}`;
}

/** Fills the form from a fragment and gives its choices; null where it holds no prompt. */
export function fromFragment(fragment, form) {
  const parameters = new URLSearchParams(fragment.slice(1));
  if (!parameters.get("prompt")) return null;
  for (const field of named(form)) {
    const value = parameters.get(field.name);
    if (field.type === "checkbox") field.checked = value === "1";
    else field.value = value ?? field.defaultValue;
  }
  const found = [...(parameters.get("choices") ?? "").matchAll(/(?<![^ ])(\d{1,7}):(\d{1,9})(?![^ ])/g)];
  const choices = found.map(([, step, id]) => ({ step: Number(step), id: Number(id) }));
  return choices.filter(({ step }, at) => choices.slice(0, at).every((before) => before.step < step));
}

function named(form) {
  return [...form.elements].filter((field) => field.name);
}
