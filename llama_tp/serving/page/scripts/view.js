"use strict";

// Messages as DOM nodes. Knows nothing of the server and of storage: buttons carry a data-action, which the page obeys.

/** A message's node. `versions`: all versions beside it, itself included. */
function messageNode(message, versions, { isLast }) {
  const node = message.role === "user" ? userNode(message) : answerNode(message);
  node.id = `message-${message.id}`;
  node.dataset.id = message.id;
  node.dataset.isLast = String(isLast);
  const actions = el("div", { class: "actions" });
  if (versions.length > 1) actions.append(versionSwitch(message, versions));
  actions.append(...(message.role === "user" ? userButtons() : answerButtons()));
  if (message.role === "assistant") actions.append(el("span", { class: "stats" }));
  node.append(actions);
  if (message.role === "assistant") updateAnswer(node, message);
  return node;
}

function userNode(message) {
  return el("article", { class: "message user", "aria-label": "You" }, el("div", { class: "bubble" }, message.content));
}

function answerNode() {
  return el(
    "article",
    { class: "message answer", "aria-label": "Answer" },
    el("div", { class: "prose" }),
    el("div", { class: "outcome" }),
  );
}

function userButtons() {
  return [
    iconButton("copy", "Copy message", { "data-action": "copy" }),
    iconButton("edit", "Edit message", { "data-action": "edit" }),
  ];
}

function answerButtons() {
  return [
    iconButton("copy", "Copy answer", { "data-action": "copy" }),
    iconButton("retry", "Regenerate answer", { "data-action": "regenerate" }),
  ];
}

function versionSwitch(message, versions) {
  const at = versions.indexOf(message);
  const group = el("span", { class: "versions", role: "group", "aria-label": "Versions" });
  const before = iconButton("before", "Previous version", { "data-action": "previous" });
  const after = iconButton("after", "Next version", { "data-action": "next" });
  before.disabled = at === 0;
  after.disabled = at === versions.length - 1;
  group.append(before, el("span", {}, `${at + 1} / ${versions.length}`), after);
  return group;
}

/** Show an answer's present text and state in its node. */
function updateAnswer(node, message) {
  const prose = node.querySelector(".prose");
  const isGenerating = message.state === "generating";
  node.setAttribute("aria-busy", String(isGenerating));
  node.dataset.state = message.state ?? "";
  if (message.content) replaceChildren(prose, rendered(message.content));
  else prose.replaceChildren(...(isGenerating ? [waiting()] : []));
  const canContinue = node.dataset.isLast === "true" && message.content !== "";
  node.querySelector(".outcome").replaceChildren(...outcomeOf(message, canContinue));
  node.querySelector(".stats")?.replaceChildren(...(isGenerating ? [] : statsOf(message.stats)));
}

function waiting() {
  const dots = el("span", { class: "waiting", role: "img", "aria-label": "Waiting for the first token" });
  dots.append(el("span"), el("span"), el("span"));
  return dots;
}

/** How the answer ended, if not by itself. */
function outcomeOf(message, canContinue) {
  const more = canContinue ? continueButton() : null;
  if (message.problem) return [problemNode(message.problem, more)];
  const notes = { length: "Stopped at the token limit.", stopped: "Stopped." };
  const note = notes[message.state];
  return note ? [el("p", { class: "note" }, note, more)] : [];
}

function continueButton() {
  const attributes = { type: "button", class: "plain", "data-action": "continue", "aria-label": "Continue answer" };
  return el("button", attributes, "Continue");
}

function problemNode({ title, detail, remedy }, more = null) {
  const buttons = {
    retry: ["retry", "Try again"],
    token: ["enter-token", "Enter token"],
    shorten: ["new-chat", "New chat"],
  };
  const [action, label] = buttons[remedy] ?? [];
  const texts = el("div", {}, el("strong", {}, title), el("p", {}, detail));
  const button = action ? el("button", { type: "button", class: "plain", "data-action": action }, label) : null;
  return el("div", { class: "problem" }, texts, button, more);
}

/** Figures of an answer, as nodes. */
function statsOf(stats) {
  if (!stats) return [];
  const parts = [`${stats.isExact ? "" : "about "}${stats.tokens} ${stats.tokens === 1 ? "token" : "tokens"}`];
  if (stats.perSecond !== null) parts.push(`${precise(stats.perSecond)} tokens/s`);
  parts.push(`first token after ${precise(stats.firstToken)} s`);
  const cached = stats.cachedTokens ? `, ${stats.cachedTokens} of them cached` : "";
  const title = stats.promptTokens === null ? null : `Prompt: ${stats.promptTokens} tokens${cached}`;
  return parts.map((part) => el("span", { title }, part));
}

/** A number with about three digits. */
function precise(number) {
  return number >= 100 ? number.toFixed(0) : number >= 10 ? number.toFixed(1) : number.toFixed(2);
}

/** The editor that replaces a user message. */
function editorNode(message) {
  const area = el("textarea", { class: "edit-text", "aria-label": "Edit message", rows: "1" });
  area.value = message.edited ?? message.content;
  return el(
    "form",
    { class: "editor" },
    area,
    el(
      "div",
      { class: "editor-buttons" },
      el("button", { type: "button", class: "plain", "data-action": "cancel-edit" }, "Cancel"),
      el("button", { type: "submit", class: "primary" }, "Send"),
    ),
  );
}

/** An entry of the list of conversations. */
function conversationNode(conversation, { isCurrent, isGenerating }) {
  const open = el(
    "button",
    { type: "button", class: "conversation", "data-action": "open", "aria-current": isCurrent ? "page" : null },
    el("span", { class: "title" }, conversation.title || "New chat"),
    isGenerating ? el("span", { class: "pulse", role: "img", "aria-label": "generating" }) : null,
  );
  const remove = iconButton("delete", `Delete chat: ${conversation.title || "New chat"}`, { "data-action": "delete" });
  remove.title = "Delete chat";
  const node = el("li", {}, open, remove);
  node.dataset.id = conversation.id;
  return node;
}
