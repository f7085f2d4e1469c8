"use strict";

// Small helpers for DOM nodes. Text is always set as text, never as HTML.

/** A new element. Children are nodes or text; null and undefined ones are left out, as are attributes. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An icon of the sheet in the page. */
function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon. */
function iconButton(name, label, attributes = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, ...attributes }, icon(name));
}

const byId = (id) => document.getElementById(id);

/** Tell screen readers, politely. */
function announce(text) {
  const status = byId("status");
  // The same text twice would not be announced again.
  status.textContent = status.textContent === text ? `${text}\u00a0` : text;
}

/** Copy text. False if the browser refuses; over plain HTTP it has only the older way. */
async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not permitted: try the older way.
    }
  }
  const focused = document.activeElement;
  const area = el("textarea", { class: "off-screen", readonly: "" });
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isCopied;
}

/** A random id. crypto.randomUUID exists in secure contexts only. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
