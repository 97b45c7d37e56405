// Elements are made by their names and texts, never from HTML: what a prompt or an answer holds stays text.

export function element(name, attributes = {}, children = []) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, children = []) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

/** The mark of a series of a plot, `size` from its centre to its side: a circle, of the second series a square. */
export function mark(series, x, y, size, kind = "") {
  const attributes = { class: `${kind} mark`.trim() };
  if (series === 0) return svg("circle", { ...attributes, cx: x, cy: y, r: size });
  const half = 0.89 * size; // which gives it the area of the circle
  return svg("rect", { ...attributes, x: x - half, y: y - half, width: 2 * half, height: 2 * half });
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function byId(id) {
  return document.getElementById(id);
}

/** The options of a select, as [value, text]; its value stays where it can. */
export function choices(select, options, value = select.value) {
  select.replaceChildren(...options.map(([key, text]) => element("option", { value: key }, [text])));
  if (options.some(([key]) => key === value)) select.value = value;
}

/** Show or hide one line of text. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
}

/** Mark a field as wrong, or no longer. */
export function fault(name, text) {
  const line = byId(`${name}-error`);
  say(line, text);
  for (const field of document.querySelectorAll(`[aria-describedby~="${name}-error"]`)) {
    if (text) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
  }
}
