"use strict";

// The page: conversations, the one that is shown, and the generations that run.

class App {
  history = new ChatHistory();
  server = new Server();
  model = null;
  running = new Map(); // Generations by conversation id
  #nodes = new Map(); // of the messages shown, by id
  #isPinned = true; // the end of the conversation stays in sight
  #frame = 0;
  #nextRender = 0;
  #saves = new Map(); // timers by conversation id

  constructor() {
    this.conversations = this.history.load();
    for (const conversation of this.conversations) this.#endInterrupted(conversation);
    const shown = this.history.shown;
    this.current = this.conversations.find(({ id }) => id === shown) ?? this.#newConversation();
    this.settings = new SettingsDialog(() => this.#settingsChanged());
    this.text = byId("composer-text");
    this.#listen();
    this.#showConversation();
    this.#loadModel();
    if (!this.history.isLasting) toast("This browser does not keep data for this page: chats last until it is closed.");
  }

  // --- what the reader does -------------------------------------------------------------------------------------

  send() {
    const content = this.text.value;
    if (!content.trim() || this.running.has(this.current.id)) return;
    const parent = shownMessages(this.current).at(-1)?.id ?? ROOT;
    this.text.value = "";
    this.#setDraft("");
    this.#keep(this.current);
    this.#ask(parent, content);
  }

  stop() {
    this.running.get(this.current.id)?.stop();
  }

  newChat() {
    this.#open(this.#newConversation());
    this.text.focus();
  }

  edit(message) {
    const node = this.#nodes.get(message.id);
    const editor = editorNode(message);
    const area = editor.querySelector("textarea");
    const close = () => {
      delete message.edited;
      editor.replaceWith(node);
      node.querySelector("[data-action=edit]").focus();
    };
    editor.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!area.value.trim() || this.running.has(this.current.id)) return;
      delete message.edited;
      this.#ask(message.parent, area.value);
      this.text.focus();
    });
    editor.querySelector("[data-action=cancel-edit]").addEventListener("click", close);
    area.addEventListener("input", () => {
      message.edited = area.value;
      this.#saveSoon(this.current);
      fit(area);
    });
    area.addEventListener("keydown", (event) => {
      if (sendsMessage(event)) {
        event.preventDefault();
        editor.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    node.replaceWith(editor);
    fit(area);
    area.focus();
  }

  regenerate(answer) {
    if (this.running.has(this.current.id)) return;
    // An attempt without any text is not worth keeping beside its successor.
    if (answer.content === "") this.#generate(answer);
    else this.#generate(addMessage(this.current, answer.parent, "assistant", ""));
  }

  continueAnswer(answer) {
    if (!this.running.has(this.current.id)) this.#generate(answer);
  }

  switchVersion(message, step) {
    const versions = versionsBelow(this.current, message.parent);
    const version = versions[versions.indexOf(message) + step];
    if (!version) return;
    this.current.chosen[message.parent] = version.id;
    this.history.save(this.current);
    this.#showMessages();
    const action = step < 0 ? "previous" : "next";
    const buttons = [...this.#nodes.get(version.id).querySelectorAll(".versions button")];
    (buttons.find((button) => button.dataset.action === action && !button.disabled) ?? buttons.find((b) => !b.disabled))?.focus();
  }

  async copy(message, button) {
    confirmCopy(button, await copyText(message.content));
  }

  remove(conversation) {
    this.running.get(conversation.id)?.stop();
    const at = this.conversations.indexOf(conversation);
    this.conversations.splice(at, 1);
    clearTimeout(this.#saves.get(conversation.id));
    this.#saves.delete(conversation.id);
    this.history.remove(conversation);
    if (conversation === this.current) this.newChat();
    else this.#showList();
    const next = byId("conversations").children[at]?.querySelector("button") ?? byId("new-chat");
    next.focus();
    toast("Chat deleted", "Undo", () => {
      this.#keep(conversation);
      this.#open(conversation);
    });
  }

  removeAll() {
    for (const generation of this.running.values()) generation.stop();
    for (const conversation of this.conversations) this.history.remove(conversation);
    this.conversations = [];
    this.newChat();
    announce("All chats deleted");
  }

  export() {
    const data = {
      format: "llama-tp-chats",
      version: 1,
      exported: new Date().toISOString(),
      model: this.model?.id ?? null,
      conversations: this.conversations.map((conversation) => ({
        ...conversation,
        shown: shownMessages(conversation).map(({ role, content }) => ({ role, content })),
      })),
    };
    const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
    const link = el("a", { href: url, download: `chats-${new Date().toISOString().slice(0, 10)}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  askForToken() {
    byId("token-value").value = this.server.token;
    byId("token").showModal();
  }

  // --- generating -----------------------------------------------------------------------------------------------

  #ask(parent, content) {
    const message = addMessage(this.current, parent, "user", content);
    this.#generate(addMessage(this.current, message.id, "assistant", ""));
  }

  async #generate(answer) {
    const { current: conversation } = this;
    const generation = new Generation(this.server, conversation, answer);
    this.running.set(conversation.id, generation);
    this.#keep(conversation);
    this.#isPinned = true;
    const ended = generation.run(this.model?.id, () => this.#textArrived(conversation));
    this.#showConversation();
    announce("Generating an answer");
    await ended;
    this.running.delete(conversation.id);
    if (this.conversations.includes(conversation)) this.#keep(conversation);
    if (conversation === this.current) this.#showEnd(answer);
    this.#showList();
    if (this.model === null && answer.state !== "failed") this.#loadModel();
  }

  #textArrived(conversation) {
    this.#saveSoon(conversation);
    if (conversation === this.current && !this.#frame) this.#frame = requestAnimationFrame((now) => this.#render(now));
  }

  /** Render the answer that is being generated: at most once per frame, and in less than a quarter of the time. */
  #render(now) {
    this.#frame = 0;
    const generation = this.running.get(this.current.id);
    if (!generation) return;
    if (now < this.#nextRender) {
      this.#frame = requestAnimationFrame((then) => this.#render(then));
      return;
    }
    const begin = performance.now();
    const node = this.#nodes.get(generation.answer.id);
    if (node) updateAnswer(node, generation.answer);
    this.#followEnd();
    this.#nextRender = now + 4 * (performance.now() - begin);
  }

  #showEnd(answer) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const node = this.#nodes.get(answer.id);
    if (node) updateAnswer(node, answer);
    this.#showComposer();
    this.#followEnd();
    announce(endOf(answer));
  }

  // --- showing --------------------------------------------------------------------------------------------------

  #newConversation() {
    const conversation = newConversation(this.history.settings);
    conversation.draft = this.history.draft;
    return conversation;
  }

  #open(conversation) {
    this.current = conversation;
    this.#isPinned = true;
    closeSidebar();
    this.#showConversation();
  }

  #showConversation() {
    this.history.shown = this.current.id;
    this.text.value = this.current.draft;
    fit(this.text);
    this.#showMessages();
    this.#showList();
    this.#showComposer();
    this.#followEnd();
  }

  #showMessages() {
    const shown = shownMessages(this.current);
    this.#nodes.clear();
    for (const message of shown) {
      const versions = versionsBelow(this.current, message.parent);
      this.#nodes.set(message.id, messageNode(message, versions, { isLast: message === shown.at(-1) }));
    }
    byId("messages").replaceChildren(...this.#nodes.values());
    byId("welcome").hidden = shown.length > 0;
  }

  #showList() {
    const nodes = this.conversations.map((conversation) =>
      conversationNode(conversation, {
        isCurrent: conversation === this.current,
        isGenerating: this.running.has(conversation.id),
      }),
    );
    byId("conversations").replaceChildren(...nodes);
    byId("no-conversations").hidden = nodes.length > 0;
    for (const id of ["export", "delete-all"]) byId(id).disabled = nodes.length === 0;
    document.title = this.current.title ? `${this.current.title} – Chat` : "Chat";
  }

  #showComposer() {
    const isGenerating = this.running.has(this.current.id);
    byId("messages").dataset.generating = String(isGenerating);
    byId("send").hidden = isGenerating;
    byId("stop-button").hidden = !isGenerating;
    byId("send").disabled = !this.text.value.trim();
    const { system, sampling } = this.current.settings;
    byId("settings-button").dataset.isChanged = String(Boolean(system || Object.keys(sampling).length));
  }

  #followEnd() {
    const scroller = byId("scroller");
    if (this.#isPinned) scroller.scrollTop = scroller.scrollHeight;
    byId("to-end").hidden = this.#isPinned;
  }

  // --- keeping --------------------------------------------------------------------------------------------------

  /** Store a conversation, now and as the newest. */
  #keep(conversation) {
    conversation.updated = Date.now();
    this.conversations = [conversation, ...this.conversations.filter((other) => other !== conversation)];
    this.#save(conversation);
  }

  #save(conversation) {
    clearTimeout(this.#saves.get(conversation.id));
    this.#saves.delete(conversation.id);
    if (!this.history.save(conversation)) {
      toast("This browser's storage for the page is full: export and delete old chats to keep new ones.");
    }
  }

  #saveSoon(conversation) {
    if (this.#saves.has(conversation.id)) return;
    this.#saves.set(
      conversation.id,
      setTimeout(() => {
        this.#saves.delete(conversation.id);
        if (this.conversations.includes(conversation)) this.#save(conversation);
      }, 1000),
    );
  }

  /** The page was closed while these answers were generated. */
  #endInterrupted(conversation) {
    for (const message of Object.values(conversation.messages)) {
      if (message.state !== "generating") continue;
      message.state = "failed";
      message.problem = new Problem("The answer broke off", "The page was closed while it was generated.").data;
    }
  }

  /** Another tab has stored or deleted a conversation. */
  #changedElsewhere(event) {
    const id = this.history.idIn(event.key);
    if (id === null || this.running.has(id)) return;
    const isShown = this.current.id === id;
    this.conversations = this.history.load();
    const changed = this.conversations.find((conversation) => conversation.id === id);
    if (!this.conversations.some((conversation) => conversation.id === this.current.id)) {
      if (this.running.has(this.current.id)) this.conversations.unshift(this.current);
    } else if (!isShown) {
      this.conversations = this.conversations.map((one) => (one.id === this.current.id ? this.current : one));
    }
    if (isShown && changed) {
      this.current = changed;
      this.#showMessages();
    }
    this.#showList();
  }

  #settingsChanged() {
    this.history.settings = this.current.settings;
    if (this.conversations.includes(this.current)) this.#saveSoon(this.current);
    this.#showComposer();
  }

  async #loadModel() {
    const name = byId("model");
    try {
      this.model = await this.server.model();
      name.textContent = this.model.id;
      byId("context").textContent = `${this.model.max_model_len.toLocaleString("en")} tokens of context`;
      byId("notice").hidden = true;
    } catch (error) {
      const { title, detail, remedy } = error instanceof Problem ? error.data : new Problem(...UNREACHABLE).data;
      name.textContent = "No model";
      byId("context").textContent = "";
      byId("notice").replaceChildren(problemNode({ title, detail, remedy: remedy === "token" ? remedy : "retry" }));
      byId("notice").hidden = false;
    }
  }

  // --- listening ------------------------------------------------------------------------------------------------

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.text.addEventListener("input", () => this.#typed());
    this.text.addEventListener("keydown", (event) => this.#keyInComposer(event));
    byId("stop-button").addEventListener("click", () => {
      this.stop();
      this.text.focus();
    });
    byId("messages").addEventListener("click", (event) => this.#clickInMessages(event));
    byId("notice").addEventListener("click", (event) => this.#clickInNotice(event));
    byId("conversations").addEventListener("click", (event) => this.#clickInList(event));
    byId("welcome").addEventListener("click", (event) => this.#clickInWelcome(event));
    byId("new-chat").addEventListener("click", () => this.newChat());
    byId("export").addEventListener("click", () => this.export());
    byId("delete-all").addEventListener("click", () => byId("confirm").showModal());
    byId("settings-button").addEventListener("click", () => this.settings.open(this.current.settings));
    byId("theme-button").addEventListener("click", () => {
      theme.choose(theme.other());
      showTheme();
    });
    theme.system.addEventListener("change", showTheme);
    byId("menu").addEventListener("click", openSidebar);
    byId("backdrop").addEventListener("click", closeSidebar);
    byId("close-sidebar").addEventListener("click", closeSidebar);
    byId("to-end").addEventListener("click", () => {
      this.#isPinned = true;
      this.#followEnd();
    });
    byId("scroller").addEventListener("scroll", () => this.#scrolled());
    new ResizeObserver(() => this.#followEnd()).observe(byId("scroller"));
    document.addEventListener("keydown", (event) => this.#keyAnywhere(event));
    addEventListener("storage", (event) => this.#changedElsewhere(event));
    addEventListener("pagehide", () => [...this.#saves.keys()].forEach((id) => this.#saveNow(id)));
    this.#listenToDialogs();
    showTheme();
  }

  #listenToDialogs() {
    byId("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.server.token = byId("token-value").value.trim();
      byId("token").close();
      this.#loadModel();
      const last = shownMessages(this.current).at(-1);
      if (last?.problem?.remedy === "token") this.regenerate(last);
    });
    byId("token-cancel").addEventListener("click", () => byId("token").close());
    byId("confirm-cancel").addEventListener("click", () => byId("confirm").close());
    byId("confirm-form").addEventListener("submit", (event) => {
      event.preventDefault();
      byId("confirm").close();
      this.removeAll();
    });
    byId("token-button").addEventListener("click", () => {
      byId("settings").close();
      this.askForToken();
    });
    for (const id of ["token", "confirm"]) closeOnBackdrop(byId(id));
  }

  #saveNow(id) {
    const conversation = this.conversations.find((one) => one.id === id);
    if (conversation) this.history.save(conversation);
  }

  #typed() {
    this.#setDraft(this.text.value);
    fit(this.text);
    this.#showComposer();
  }

  #setDraft(text) {
    this.current.draft = text;
    if (this.conversations.includes(this.current)) this.#saveSoon(this.current);
    else this.history.draft = text;
  }

  #keyInComposer(event) {
    if (sendsMessage(event)) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && this.text.value === "" && !this.running.has(this.current.id)) {
      const mine = shownMessages(this.current).findLast((message) => message.role === "user");
      if (mine) {
        event.preventDefault();
        this.edit(mine);
      }
    }
  }

  #keyAnywhere(event) {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.dataset.sidebar === "open") closeSidebar();
    else this.stop();
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = byId("scroller");
    this.#isPinned = scrollHeight - scrollTop - clientHeight < 48;
    byId("to-end").hidden = this.#isPinned;
  }

  async #clickInMessages(event) {
    const button = event.target.closest("button[data-action]");
    const node = button?.closest("[data-id]");
    if (!node) return;
    const message = this.current.messages[node.dataset.id];
    const { action } = button.dataset;
    if (action === "copy") this.copy(message, button);
    if (action === "copy-code") confirmCopy(button, await copyText(codeBeside(button)));
    if (action === "edit" && !this.running.has(this.current.id)) this.edit(message);
    if (action === "regenerate" || action === "retry") this.regenerate(message);
    if (action === "continue") this.continueAnswer(message);
    if (action === "previous") this.switchVersion(message, -1);
    if (action === "next") this.switchVersion(message, 1);
    if (action === "enter-token") this.askForToken();
    if (action === "new-chat") this.newChat();
  }

  #clickInNotice(event) {
    const action = event.target.closest("button")?.dataset.action;
    if (action === "enter-token") this.askForToken();
    if (action === "retry") this.#loadModel();
  }

  #clickInList(event) {
    const button = event.target.closest("button");
    const id = button?.closest("[data-id]").dataset.id;
    const conversation = this.conversations.find((one) => one.id === id);
    if (!conversation) return;
    if (button.dataset.action === "delete") this.remove(conversation);
    else {
      this.#open(conversation);
      this.text.focus();
    }
  }

  #clickInWelcome(event) {
    const example = event.target.closest("button");
    if (!example) return;
    this.text.value = example.textContent;
    this.#typed();
    this.text.focus();
  }
}

/** Whether a key press sends the text: Enter does, but not the one that ends a composition of characters. */
function sendsMessage(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Make a text area as high as its text. The style sheet limits it. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

function codeBeside(button) {
  return button.closest(".code").querySelector("code").textContent;
}

/** Show for a moment that something was copied. */
function confirmCopy(button, isCopied) {
  const use = button.querySelector("use");
  use.setAttribute("href", isCopied ? "#icon-done" : "#icon-copy");
  setTimeout(() => use.setAttribute("href", "#icon-copy"), 1500);
  announce(isCopied ? "Copied" : "The browser refused to copy");
}

/** What screen readers hear at the end of an answer. */
function endOf(answer) {
  if (answer.problem) return `${answer.problem.title}. ${answer.problem.detail}`;
  const heard = answer.content.length <= 400 ? `: ${answer.content}` : `, ${answer.stats?.tokens ?? 0} tokens`;
  return (answer.state === "stopped" ? "Answer stopped" : "Answer complete") + heard;
}

function showTheme() {
  const button = byId("theme-button");
  const label = `Switch to the ${theme.other()} theme`;
  button.setAttribute("aria-label", label);
  button.title = label;
  button.querySelector("use").setAttribute("href", theme.current() === "dark" ? "#icon-light" : "#icon-dark");
}

function openSidebar() {
  document.body.dataset.sidebar = "open";
  byId("main").inert = true;
  byId("menu").setAttribute("aria-expanded", "true");
  byId("new-chat").focus();
}

function closeSidebar() {
  if (document.body.dataset.sidebar !== "open") return;
  delete document.body.dataset.sidebar;
  byId("main").inert = false;
  byId("menu").setAttribute("aria-expanded", "false");
  byId("menu").focus();
}

/** Show a short message at the bottom, with an action to undo what was done. */
function toast(text, label, action) {
  const node = el("div", { class: "toast" }, el("span", {}, text));
  const timer = setTimeout(() => node.remove(), 8000);
  const close = () => {
    clearTimeout(timer);
    node.remove();
  };
  if (label) {
    const button = el("button", { type: "button", class: "plain" }, label);
    button.addEventListener("click", () => {
      close();
      action();
    });
    node.append(button);
  }
  byId("toasts").replaceChildren(node);
  announce(text);
}

const app = new App();
