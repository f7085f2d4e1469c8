"use strict";

// The server's API, relative to the page's own address, and its errors in words for readers.

/** What went wrong: a title, details, and what the reader can do about it. */
class Problem extends Error {
  constructor(title, detail, { remedy = "retry" } = {}) {
    super(title);
    this.title = title;
    this.detail = detail;
    this.remedy = remedy;
  }

  /** Ready for JSON. */
  get data() {
    return { title: this.title, detail: this.detail, remedy: this.remedy };
  }
}

const UNREACHABLE = ["The server cannot be reached", "It may have been stopped, or the connection is down."];
const INTERRUPTED = ["The answer broke off", "The connection to the server was lost before the end of the answer."];

class Server {
  /** TorchServe's inference token, or that of a proxy. Kept until the tab is closed. */
  get token() {
    try {
      return sessionStorage.getItem("llama-tp-chat:token") ?? "";
    } catch {
      return this.unsaved ?? "";
    }
  }

  set token(token) {
    this.unsaved = token;
    try {
      sessionStorage.setItem("llama-tp-chat:token", token);
    } catch {
      // Storage is disabled.
    }
  }

  /** The model: {id, max_model_len}. A Problem if it is not served. */
  async model() {
    const response = await this.#fetch("v1/models", {});
    return (await response.json()).data[0];
  }

  /**
   * Make the server notice that an answer was aborted. TorchServe reports a client that has gone with the next request
   * only; until then, the engine would go on for some seconds. On a busy machine, TorchServe itself notices late.
   */
  reportAbort() {
    for (const delay of [100, 700, 3000]) setTimeout(() => this.model().catch(() => {}), delay);
  }

  /** The chunks of a streamed answer, parsed. A Problem if it fails; an AbortError if it is aborted. */
  async *chunks(body, signal) {
    const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers,
      body: JSON.stringify(body),
      signal,
    });
    try {
      for await (const data of eventsOf(response)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw problemOf(chunk.error);
        yield chunk;
      }
    } catch (error) {
      if (error instanceof Problem || error.name === "AbortError") throw error;
      throw new Problem(...INTERRUPTED);
    }
    throw new Problem(...INTERRUPTED);
  }

  async #fetch(route, options) {
    const headers = { ...options.headers };
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    let response;
    try {
      response = await fetch(route, { ...options, headers, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(...UNREACHABLE);
    }
    if (!response.ok) throw await problemIn(response);
    return response;
  }
}

/** The Problem that an error response reports. */
async function problemIn(response) {
  let body = null;
  try {
    body = JSON.parse(await response.text());
  } catch {
    // A proxy's page, or an empty body.
  }
  const message = body?.error?.message ?? body?.message ?? "";
  if (response.status === 401 || response.status === 403 || body?.type === "InvalidKeyException") {
    return new Problem("The server wants a token", "The token is missing, wrong, or has expired.", { remedy: "token" });
  }
  if (response.status === 413) {
    return new Problem("The conversation is too large", message || "The server does not accept a request of this size.");
  }
  if (response.status === 429 || response.status === 503) {
    const detail = body?.error ? sentence(message) : "Its queue is full, or the model is being restarted.";
    return new Problem("The server is busy", `${detail} Try again in a moment.`);
  }
  if (response.status === 502 || response.status === 504) return new Problem(...UNREACHABLE);
  if (body?.error) return problemOf(body.error);
  return new Problem(`The server answered with status ${response.status}`, sentence(message));
}

/** The Problem that an error object of the API describes. */
function problemOf({ code, message, type }) {
  const detail = sentence(message ?? "");
  if (code === "chat_not_supported") return new Problem("This model cannot chat", detail, { remedy: "none" });
  if (code === "context_length_exceeded") {
    return new Problem("The conversation is too long for this model", detail, { remedy: "shorten" });
  }
  if (type === "server_error") return new Problem("The server failed", detail);
  return new Problem("The server refused the request", detail);
}

/** A message of the server as a sentence. */
function sentence(message) {
  if (message === "") return "";
  return message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}
