"use strict";

// Server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html. Only `data` is used.

/** Parses events out of chunks that may end anywhere, also inside a line end or a character. */
class EventParser {
  #decoder = new TextDecoder("utf-8");
  #line = "";
  #data = [];
  #endedWithReturn = false;

  /** The data of the events that a chunk of bytes completes. */
  push(bytes) {
    const events = [];
    const text = this.#decoder.decode(bytes, { stream: true });
    if (text === "") return events; // less than a character
    const isHalf = this.#endedWithReturn && text.startsWith("\n"); // the second half of a line end
    this.#endedWithReturn = text.endsWith("\r");
    const lines = (this.#line + (isHalf ? text.slice(1) : text)).split(/\r\n|\n|\r/);
    this.#line = lines.pop();
    for (const line of lines) {
      const data = this.#take(line);
      if (data !== null) events.push(data);
    }
    return events;
  }

  /** The data of the event that a line completes, or null. */
  #take(line) {
    if (line === "") {
      const data = this.#data;
      this.#data = [];
      return data.length ? data.join("\n") : null;
    }
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "data") this.#data.push(value);
    return null;
  }
}

/** The data of each event in a response's body. */
async function* eventsOf(response) {
  const parser = new EventParser();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
