"use strict";

// From a model's markdown to DOM nodes. The text is never interpreted as HTML: the parser shows tags as text, and the
// sanitizer admits only the elements that markdown has. Nothing is loaded: an image becomes a link to it.

const SAFE_URL = /^(?:https?:\/\/|mailto:)/i;

const markdown = markdownit({ html: false, linkify: true, typographer: false, highlight: highlighted });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
markdown.validateLink = (url) => SAFE_URL.test(url);

markdown.renderer.rules.image = (tokens, index) => {
  const { content, attrs } = tokens[index];
  const { escapeHtml } = markdown.utils;
  const source = Object.fromEntries(attrs).src;
  return `<a href="${escapeHtml(source)}">${escapeHtml(content || source)}</a>`;
};

// Columns are aligned by a class, since the page's policy allows no style attributes.
for (const cell of ["th_open", "td_open"]) {
  markdown.renderer.rules[cell] = (tokens, index, options, _env, renderer) => {
    const token = tokens[index];
    const alignment = /text-align:(\w+)/.exec(token.attrGet("style") ?? "");
    token.attrs = alignment ? [["class", `align-${alignment[1]}`]] : null;
    return renderer.renderToken(tokens, index, options);
  };
}

const SANITIZED = {
  ALLOWED_TAGS: [
    ...["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code"],
    ...["em", "strong", "s", "a", "span", "table", "thead", "tbody", "tr", "th", "td"],
  ],
  ALLOWED_ATTR: ["href", "title", "start", "class"],
  ALLOWED_URI_REGEXP: SAFE_URL,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const CLASS = /^(?:language-[\w+#.-]{1,32}|align-(?:left|center|right)|hljs-[a-z_-]+(?: [a-z]+_)*)$/;

/** HTML of code with its parts marked, or "" if the language is not known. Kept, as an answer is rendered many times. */
function highlighted(code, language) {
  if (!hljs.getLanguage(language)) return "";
  const key = `${language} ${code}`;
  if (!highlighted.kept.has(key)) {
    if (highlighted.kept.size > 100) highlighted.kept.clear();
    highlighted.kept.set(key, hljs.highlight(code, { language, ignoreIllegals: true }).value);
  }
  return highlighted.kept.get(key);
}
highlighted.kept = new Map();

/** A fragment with the text's elements. */
function rendered(text) {
  const fragment = DOMPurify.sanitize(markdown.render(text), SANITIZED);
  for (const element of fragment.querySelectorAll("[class]")) {
    if (!CLASS.test(element.className)) element.removeAttribute("class");
  }
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.rel = "noopener noreferrer";
    link.target = "_blank";
  }
  // An answer is below the page's own heading.
  for (const heading of fragment.querySelectorAll("h1, h2, h3, h4, h5, h6")) demote(heading);
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  return fragment;
}

function demote(heading) {
  const level = Math.min(Number(heading.tagName[1]) + 2, 6);
  const lower = el(`h${level}`, {}, ...heading.childNodes);
  heading.replaceWith(lower);
}

/** Put a title with the language and a copy button above a block of code. */
function frameCode(pre) {
  const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
  const name = language ? `${language} code` : "code";
  const copy = el("button", { type: "button", class: "quiet", "data-action": "copy-code" }, icon("copy"), "Copy");
  const frame = el("div", { class: "code" }, el("div", { class: "code-bar" }, el("span", {}, language), copy));
  copy.setAttribute("aria-label", `Copy ${name}`);
  pre.replaceWith(frame);
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", name);
  frame.append(pre);
}

/** Make a parent's children those of a fragment, and keep the nodes that are the same: the selection survives. */
function replaceChildren(parent, fragment) {
  let old = parent.firstChild;
  let fresh = fragment.firstChild;
  while (old && fresh && old.isEqualNode(fresh)) {
    old = old.nextSibling;
    fresh.remove();
    fresh = fragment.firstChild;
  }
  while (old) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
  parent.append(fragment);
}
