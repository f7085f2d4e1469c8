"use strict";

// The generation of one answer: fills a message in, chunk by chunk.

class Generation {
  #controller = new AbortController();

  constructor(server, conversation, answer) {
    this.server = server;
    this.conversation = conversation;
    this.answer = answer;
  }

  stop() {
    this.#controller.abort();
  }

  /** Returns once the answer is complete, stopped or failed. `onText` is called after every change of the text. */
  async run(model, onText) {
    const { answer, conversation } = this;
    const isContinued = answer.content !== "";
    const messages = messagesUpTo(conversation, answer).slice(0, isContinued ? undefined : -1);
    const clock = new Clock(isContinued ? answer.stats : null);
    answer.state = "generating";
    delete answer.problem;
    try {
      for await (const chunk of this.server.chunks(requestFor(conversation, messages, model), this.#controller.signal)) {
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) {
          clock.tick();
          answer.content += choice.delta.content;
          onText();
        }
        if (choice?.finish_reason) answer.state = choice.finish_reason;
        if (chunk.usage) clock.count(chunk.usage);
      }
      if (answer.state === "generating") answer.state = "stop";
    } catch (error) {
      this.#end(error);
    }
    answer.stats = clock.stats;
  }

  #end(error) {
    if (error.name === "AbortError") {
      this.answer.state = "stopped";
      this.server.reportAbort();
      return;
    }
    this.answer.state = "failed";
    const problem = error instanceof Problem ? error : new Problem("The page failed", String(error));
    this.answer.problem = problem.data;
  }
}

/** Times an answer. Seconds. */
class Clock {
  #start = performance.now();
  #first = null;
  #last = null;
  #chunks = 0;
  #usage = null;

  /** `before`: the stats of the part of the answer that is continued. */
  constructor(before) {
    this.before = before;
  }

  tick() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#chunks += 1;
  }

  count(usage) {
    this.#usage = usage;
  }

  /** Without usage, as after a stop, the number of chunks stands for that of tokens. */
  get stats() {
    if (this.#first === null) return this.before;
    const tokens = this.#usage?.completion_tokens ?? this.#chunks;
    const seconds = (this.#last - this.#first) / 1000;
    return {
      tokens: tokens + (this.before?.tokens ?? 0),
      isExact: this.#usage !== null && (this.before?.isExact ?? true),
      perSecond: tokens > 1 && seconds > 0.02 ? (tokens - 1) / seconds : null,
      firstToken: this.before?.firstToken ?? (this.#first - this.#start) / 1000,
      promptTokens: this.#usage?.prompt_tokens ?? null,
      cachedTokens: this.#usage?.prompt_tokens_details?.cached_tokens ?? null,
    };
  }
}
