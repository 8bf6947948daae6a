// Elements without a framework. Text is always set as text: nothing that a server or a model says becomes HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** An HTML element: h("p", {class: "note", onclick}, "text", child, null). */
export const h = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children);

/** The same for SVG. */
export const s = (name, attributes = {}, ...children) => build(document.createElementNS(SVG, name), attributes, children);

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace what is in `parent`, unless it would look the same: selections and focus survive quiet polls. */
export function show(parent, ...children) {
  const next = document.createElement("div");
  next.append(...children.flat().filter(Boolean));
  if (next.innerHTML !== parent.innerHTML) parent.replaceChildren(...next.childNodes);
}

/** A share as a bar, hidden from screen readers where it has no label of its own. Style attributes are not allowed here, properties are. */
export function bar(share, kind, label) {
  const fill = h("span", { class: `fill ${kind}` });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return h("span", { class: "meter", role: label ? "img" : null, "aria-label": label, "aria-hidden": label ? null : "true" }, fill);
}
