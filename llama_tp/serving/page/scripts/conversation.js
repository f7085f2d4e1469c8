"use strict";

// A conversation is a tree: editing a message or regenerating an answer adds a version beside it, so nothing is lost.
// `chosen` names the version shown below each message. Everything in it is plain data, ready for JSON.

const ROOT = "root";

function newConversation(settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings, messages: {}, chosen: {}, draft: "" };
}

/** All versions of the message below a parent, oldest first. */
function versionsBelow(conversation, parent) {
  return Object.values(conversation.messages).filter((message) => message.parent === parent);
}

/** The messages shown, from the first to the last. */
function shownMessages(conversation) {
  const shown = [];
  let parent = ROOT;
  for (;;) {
    const message = conversation.messages[conversation.chosen[parent]];
    if (!message) return shown;
    shown.push(message);
    parent = message.id;
  }
}

/** The messages that lead to one, including it. */
function messagesUpTo(conversation, last) {
  const shown = [];
  for (let message = last; message; message = conversation.messages[message.parent]) shown.unshift(message);
  return shown;
}

/** Add a version below a parent and show it. */
function addMessage(conversation, parent, role, content) {
  const message = { id: newId(), parent, role, content };
  conversation.messages[message.id] = message;
  conversation.chosen[parent] = message.id;
  conversation.title ||= content.trim().replace(/\s+/g, " ").slice(0, 80);
  return message;
}

/** Messages for the server. What was asked without success is part of the next question: formats want roles to alternate. */
function dialogOf(messages) {
  const dialog = [];
  for (const { role, content } of messages) {
    if (role === "assistant" && content === "") continue;
    if (dialog.at(-1)?.role === role) dialog.at(-1).content += `\n\n${content}`;
    else dialog.push({ role, content });
  }
  return dialog;
}

/** The body of the request for an answer to the messages. */
function requestFor(conversation, messages, model) {
  const { system, sampling } = conversation.settings;
  const dialog = dialogOf(messages);
  if (system.trim()) dialog.unshift({ role: "system", content: system });
  const continues = messages.at(-1).role === "assistant";
  return {
    model,
    messages: dialog,
    stream: true,
    stream_options: { include_usage: true },
    ...sampling,
    ...(continues ? { continue_final_message: true, add_generation_prompt: false } : {}),
  };
}

/** Whether stored data is a conversation: other programs may write to the same storage. */
function isConversation(data) {
  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  return (
    isObject(data) &&
    [data.id, data.title, data.draft].every((value) => typeof value === "string") &&
    [data.messages, data.chosen, data.settings, data.settings?.sampling].every(isObject) &&
    typeof data.settings.system === "string" &&
    Object.entries(data.messages).every(
      ([id, message]) =>
        isObject(message) &&
        message.id === id &&
        typeof message.content === "string" &&
        ["user", "assistant"].includes(message.role),
    )
  );
}
