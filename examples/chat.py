"""A conversation with a chat model, streamed token by token, without a server:

python examples/chat.py demo/converted_checkpoints "What is the capital of France?" "And of Italy?"
"""

import sys

import llama_tp
from llama_tp.engine.request import Request
from llama_tp.text import Message, TextStream


def main(folder: str, *questions: str) -> None:
    args = llama_tp.ModelArgs.load(f"{folder}/model_args.json")
    config = llama_tp.EngineConfig(max_seq_len=args.max_seq_len, max_batch_size=1)
    engine = llama_tp.load_engine(folder, args, config, llama_tp.join())
    tokenizer = llama_tp.load_tokenizer(folder)
    chat = llama_tp.chat_format("auto", tokenizer)
    params = llama_tp.SamplingParams(max_new_tokens=64, temperature=0, stop_ids=chat.stop_ids)
    dialog = []
    for number, question in enumerate(questions):
        dialog.append(Message("user", question))
        engine.add(Request(f"turn {number}", tuple(chat.encode(dialog)), params))
        stream, answer = TextStream(tokenizer), ""
        print(f"> {question}")
        while engine.num_requests:
            for event in engine.step():  # earlier turns are prefix-cache hits, not computed again
                text = stream.push(event.token_id) if event.token_id is not None else ""
                answer += text
                print(text, end="", flush=True)
        print()
        dialog.append(Message("assistant", answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
