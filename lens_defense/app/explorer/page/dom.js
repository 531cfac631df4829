// Elements in one line each. Text goes in as text, never as markup, so nothing in it is obeyed.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "style") element.style.cssText = value; // not the attribute: a content policy may forbid it
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  for (const child of children.flat(9)) {
    if (child != null && child !== false) element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function replace(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((child) => child != null && child !== false));
}

function button(text, title, action, kind = "") {
  return h("button", { type: "button", title, class: kind, onclick: action }, text);
}

// A text with its line breaks, as the model wrote it.
const prose = (text, kind = "prose") => h("div", { class: kind, dir: "auto" }, text);

const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)}%`);
const number = (value, digits = 2) =>
  value == null ? "–" : value.toFixed(digits).replace(/^(-?)0\./, "$1.").replace("-", "−");

function throttled(action, milliseconds) {
  let timer = null;
  let latest = null;
  return (...values) => {
    latest = values;
    if (timer != null) return;
    action(...latest);
    latest = null;
    timer = setTimeout(() => {
      timer = null;
      if (latest) action(...latest);
    }, milliseconds);
  };
}
