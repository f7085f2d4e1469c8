"""A model in the terminal: one completion, or a conversation. Uses the server's engine loop, on any number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

from llama_tp.config import EngineConfig
from llama_tp.engine.loop import EngineLoop, EngineThread
from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.engine.stats import EngineStats
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join
from llama_tp.text.chat import chat_format
from llama_tp.text.detokenizer import TextStream
from llama_tp.text.dialog import ChatError, Message
from llama_tp.text.tokenizer import Tokenizer, load_tokenizer
from llama_tp.text.tokenizer_files import find_tokenizer


def run_console(
    checkpoint: str,
    act: Callable[[Console], object],
    *,
    tokenizer: str | None = None,
    dtype: str = "auto",
    compile: bool | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    speculative_tokens: int = 0,
) -> None:
    """Load a checkpoint on all ranks, run `act` on the leader, and finish on all ranks together."""
    args = ModelArgs.load_converted(Path(checkpoint, "model_args.json"))
    vocabulary = load_tokenizer(tokenizer or _find_tokenizer(Path(checkpoint)), embedding_rows=args.vocab_size)
    config = EngineConfig(
        max_seq_len=args.max_seq_len,
        max_batch_size=1,
        dtype=dtype,
        compile=compile,
        device=device,
        threads=threads,
        speculative_tokens=speculative_tokens,
    )
    group = join(config.device, timeout_s=config.collective_timeout_s)
    thread = EngineThread()
    engine = thread.call(lambda: load_engine(checkpoint, args, config, group))
    if not engine.is_leader:
        thread.call(engine.follow)
    else:
        loop = EngineLoop(engine, abandon_after_s=float("inf"), thread=thread)
        loop.start()
        try:
            act(Console(loop, vocabulary))
        finally:
            loop.stop()
    group.comm.close()


class Console:
    """The leader's interaction with the user at the terminal."""

    def __init__(self, loop: EngineLoop, tokenizer: Tokenizer) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._max_seq_len = loop.engine.config.max_seq_len
        self._num_requests = 0

    def complete(self, prompt: str, params: SamplingParams) -> str:
        """Print the continuation of a prompt as it is generated, then a line of statistics on stderr."""
        ids = self._tokenizer.encode(prompt, bos=self._tokenizer.adds_bos)
        return self._answer(ids, params, self._tokenizer.stop_ids, continues=True)

    def chat(self, format_name: str, params: SamplingParams, system: str | None = None) -> None:
        """Read lines and print answers until the end of input or an empty line."""
        chat = chat_format(format_name, self._tokenizer)
        print(f"Chat format: {chat.name} ({chat.origin}).", file=sys.stderr)
        dialog = [Message("system", system)] if system else []
        print("Ctrl-D or an empty line ends the conversation.", file=sys.stderr)
        while line := _ask():
            try:
                ids = chat.encode([*dialog, Message("user", line)])
                answer = self._answer(ids, params, chat.stop_ids, continues=False)
            except (ChatError, ValueError) as error:
                print(error, file=sys.stderr)
                continue
            dialog += [Message("user", line), Message("assistant", answer)]

    def _answer(
        self, prompt: Sequence[int], params: SamplingParams, stop_ids: frozenset[int], *, continues: bool
    ) -> str:
        """Generate and print. `continues`: the text continues that of the prompt."""
        remaining = self._max_seq_len - len(prompt)
        if remaining < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; it must have fewer than max_seq_len={self._max_seq_len}"
            )
        self._num_requests += 1
        params = params.but(stop_ids=stop_ids, max_new_tokens=min(params.max_new_tokens, remaining))
        before = self._loop.stats()
        start = first = perf_counter()
        self._loop.submit(Request(str(self._num_requests), tuple(prompt), params))
        stream = TextStream(self._tokenizer, after=prompt if continues else ())
        text, count, reason = "", 0, None
        while reason is None:
            for event in self._loop.poll(1.0):
                if event.token_id is not None:
                    first = perf_counter() if count == 0 else first
                    count += 1
                    text += _show(stream.push(event.token_id))
                reason = event.finish_reason
        text += _show(stream.flush() + "\n").removesuffix("\n")
        if reason is FinishReason.ERROR:
            raise ValueError("the model produced non-finite logits")
        rate = f", {(count - 1) / (perf_counter() - first):.1f} tokens/s after it" if count > 1 else ""
        drafts = _describe_drafts(before, self._loop.stats())
        print(
            f"[{len(prompt)} + {count} tokens, first after {first - start:.2f} s{rate}{drafts}; {reason.value}]",
            file=sys.stderr,
        )
        return text


def _describe_drafts(before: EngineStats, after: EngineStats) -> str:
    drafted = after.drafted_tokens - before.drafted_tokens
    return f"; {after.accepted_tokens - before.accepted_tokens} of {drafted} predicted tokens right" if drafted else ""


def _show(text: str) -> str:
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def _ask() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _find_tokenizer(checkpoint: Path) -> Path:
    """The tokenizer in the checkpoint's folder, or in the folder that contains it."""
    for folder in (checkpoint, checkpoint.resolve().parent):
        with suppress(FileNotFoundError):
            return find_tokenizer(folder)
    raise FileNotFoundError(f"there is no tokenizer in {checkpoint} or next to it; pass --tokenizer")
