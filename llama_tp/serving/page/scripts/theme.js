"use strict";

// Light or dark: the system's preference, unless the reader has chosen the other one.

const theme = {
  key: "llama-tp-chat:theme",
  system: matchMedia("(prefers-color-scheme: dark)"),

  current() {
    return document.documentElement.dataset.theme ?? (this.system.matches ? "dark" : "light");
  },

  other() {
    return this.current() === "dark" ? "light" : "dark";
  },

  /** Set a theme; the system's own is not stored, so that the page follows it again. */
  choose(name) {
    const isSystem = name === (this.system.matches ? "dark" : "light");
    if (isSystem) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    try {
      if (isSystem) localStorage.removeItem(this.key);
      else localStorage.setItem(this.key, name);
    } catch {
      // Storage is disabled: the choice holds until the page is closed.
    }
  },

  restore() {
    try {
      const stored = localStorage.getItem(this.key);
      if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
    } catch {
      // Storage is disabled.
    }
  },
};

theme.restore();
