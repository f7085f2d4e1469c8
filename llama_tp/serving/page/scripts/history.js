"use strict";

// Conversations are kept in this browser only: one entry of localStorage each, under the page's path, since several
// models may share an origin. Without localStorage they last until the page is closed.

class ChatHistory {
  #prefix = `llama-tp-chat:${location.pathname}:`;
  #storage;

  constructor() {
    try {
      localStorage.setItem(`${this.#prefix}probe`, "");
      localStorage.removeItem(`${this.#prefix}probe`);
      this.#storage = localStorage;
    } catch (error) {
      this.#storage = error.name === "QuotaExceededError" ? localStorage : new MemoryStorage();
    }
  }

  get isLasting() {
    return !(this.#storage instanceof MemoryStorage);
  }

  /** All conversations, newest first. */
  load() {
    const found = [];
    for (let at = 0; at < this.#storage.length; at += 1) {
      const key = this.#storage.key(at);
      if (!key.startsWith(`${this.#prefix}chat:`)) continue;
      try {
        const data = JSON.parse(this.#storage.getItem(key));
        if (isConversation(data)) found.push(data);
      } catch {
        // Not ours.
      }
    }
    return found.sort((one, other) => other.updated - one.updated);
  }

  /** Whether a conversation could be stored. */
  save(conversation) {
    return this.#set(`chat:${conversation.id}`, JSON.stringify(conversation));
  }

  remove(conversation) {
    this.#storage.removeItem(`${this.#prefix}chat:${conversation.id}`);
  }

  /** What another tab changed: the id of a conversation, or null. */
  idIn(key) {
    const prefix = `${this.#prefix}chat:`;
    return key?.startsWith(prefix) ? key.slice(prefix.length) : null;
  }

  /** The text written in a new conversation, which is stored only once it is sent. */
  get draft() {
    return this.#storage.getItem(`${this.#prefix}draft`) ?? "";
  }

  set draft(text) {
    this.#set("draft", text);
  }

  /** The id of the conversation that this tab shows, for when it is reloaded. */
  get shown() {
    try {
      return sessionStorage.getItem(`${this.#prefix}shown`);
    } catch {
      return null;
    }
  }

  set shown(id) {
    try {
      sessionStorage.setItem(`${this.#prefix}shown`, id);
    } catch {
      // Storage is disabled.
    }
  }

  /** The settings that a new conversation begins with. */
  get settings() {
    try {
      const { system, sampling } = JSON.parse(this.#storage.getItem(`${this.#prefix}settings`));
      if (typeof system === "string" && typeof sampling === "object") return { system, sampling: sampling ?? {} };
    } catch {
      // None were stored.
    }
    return { system: "", sampling: {} };
  }

  set settings(settings) {
    this.#set("settings", JSON.stringify(settings));
  }

  #set(name, text) {
    try {
      this.#storage.setItem(this.#prefix + name, text);
      return true;
    } catch {
      return false;
    }
  }
}

/** localStorage's interface, without a browser's storage. */
class MemoryStorage {
  #items = new Map();

  get length() {
    return this.#items.size;
  }

  key(at) {
    return [...this.#items.keys()][at] ?? null;
  }

  getItem(key) {
    return this.#items.get(key) ?? null;
  }

  setItem(key, value) {
    this.#items.set(key, value);
  }

  removeItem(key) {
    this.#items.delete(key);
  }
}
