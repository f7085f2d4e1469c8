"""Complete prompts without a server, in one process or on every rank of torchrun:

python examples/offline.py demo/converted_checkpoints
torchrun --nproc-per-node 2 --local-addr 127.0.0.1 examples/offline.py demo/converted_checkpoints
"""

import sys

import llama_tp

PROMPTS = ["Once upon a time", "1, 2, 3,"]


def main(folder: str) -> None:
    group = llama_tp.join()  # join the torchrun group; a group of one without torchrun
    args = llama_tp.ModelArgs.load(f"{folder}/model_args.json")
    engine = llama_tp.load_engine(folder, args, llama_tp.EngineConfig(max_seq_len=args.max_seq_len), group)
    tokenizer = llama_tp.load_tokenizer(folder)
    prompts = [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in PROMPTS]
    params = llama_tp.SamplingParams(max_new_tokens=16, temperature=0, stop_ids=tokenizer.stop_ids)
    completions = engine.generate(prompts, params)  # [] on all ranks but the leader
    for prompt, completion in zip(prompts, completions, strict=False):
        print(repr(tokenizer.decode([*prompt, *completion.token_ids])))
    llama_tp.exit_rank()


if __name__ == "__main__":
    main(*sys.argv[1:])
