"use strict";

// The dialog with the system prompt and the sampling parameters of a conversation. An empty field is the server's
// default. A change applies to the next answer.

class SettingsDialog {
  #dialog = byId("settings");
  #form = byId("settings-form");
  #settings = null;

  /** `onChange` is called after every valid change. */
  constructor(onChange) {
    this.onChange = onChange;
    this.#form.addEventListener("input", (event) => this.#take(event.target));
    this.#form.addEventListener("submit", (event) => this.#close(event));
    byId("settings-close").addEventListener("click", () => this.#dialog.close());
    byId("settings-reset").addEventListener("click", () => this.#reset());
    closeOnBackdrop(this.#dialog);
  }

  open(settings) {
    this.#settings = settings;
    this.#fill();
    this.#dialog.showModal();
  }

  get #numbers() {
    return [...this.#form.querySelectorAll("input[type=number]")];
  }

  #fill() {
    const { system, sampling } = this.#settings;
    byId("system").value = system;
    for (const input of this.#numbers) {
      input.value = sampling[input.name] ?? "";
      this.#check(input);
    }
    byId("stop").value = (sampling.stop ?? []).join("\n");
  }

  #take(input) {
    const { sampling } = this.#settings;
    if (input.id === "system") this.#settings.system = input.value;
    else if (input.id === "stop") this.#set(sampling, "stop", input.value.split("\n").filter(Boolean));
    else if (!this.#check(input)) return;
    else this.#set(sampling, input.name, input.value === "" ? null : Number(input.value));
    this.onChange();
  }

  #set(sampling, name, value) {
    if (value === null || value.length === 0) delete sampling[name];
    else sampling[name] = value;
  }

  /** Whether a number is valid; if not, the reason is shown below its field. */
  #check(input) {
    const isValid = input.checkValidity();
    const message = byId(`${input.id}-error`);
    input.setAttribute("aria-invalid", String(!isValid));
    message.textContent = isValid ? "" : input.validationMessage;
    return isValid;
  }

  #reset() {
    this.#settings.system = "";
    this.#settings.sampling = {};
    this.#fill();
    this.onChange();
    announce("Settings reset to the server's defaults");
  }

  #close(event) {
    event.preventDefault();
    const wrong = this.#numbers.find((input) => !input.checkValidity());
    if (wrong) wrong.focus();
    else this.#dialog.close();
  }
}

/** A click beside a dialog closes it. */
function closeOnBackdrop(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}
