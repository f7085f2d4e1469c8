"""A GGUF file as llama.cpp's converter writes it, and what its bytes mean."""

from __future__ import annotations

import gguf
import numpy as np
import torch

DIM, HIDDEN, HEADS, KV_HEADS, VOCAB = 64, 256, 4, 2, 270
META_TO_GGUF = {
    "tok_embeddings": ("token_embd", (VOCAB, DIM), gguf.GGMLQuantizationType.Q8_0),
    "norm": ("output_norm", (DIM,), gguf.GGMLQuantizationType.F32),
    "layers.0.attention.wq": ("blk.0.attn_q", (DIM, DIM), gguf.GGMLQuantizationType.Q4_1),
    "layers.0.attention.wk": ("blk.0.attn_k", (DIM // 2, DIM), gguf.GGMLQuantizationType.Q4_1),
    "layers.0.attention.wv": ("blk.0.attn_v", (DIM // 2, DIM), gguf.GGMLQuantizationType.F16),
    "layers.0.attention.wo": ("blk.0.attn_output", (DIM, DIM), gguf.GGMLQuantizationType.F32),
    "layers.0.feed_forward.w1": ("blk.0.ffn_gate", (HIDDEN, DIM), gguf.GGMLQuantizationType.Q8_0),
    "layers.0.feed_forward.w2": ("blk.0.ffn_down", (DIM, HIDDEN), gguf.GGMLQuantizationType.Q4_1),
    "layers.0.feed_forward.w3": ("blk.0.ffn_up", (HIDDEN, DIM), gguf.GGMLQuantizationType.Q8_0),
    "layers.0.attention_norm": ("blk.0.attn_norm", (DIM,), gguf.GGMLQuantizationType.F32),
    "layers.0.ffn_norm": ("blk.0.ffn_norm", (DIM,), gguf.GGMLQuantizationType.F32),
}
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def by_hand(packed, kind):
    """What the GGUF documents say that the bytes mean: blocks of 32 values, in float32."""
    if kind == gguf.GGMLQuantizationType.Q8_0:
        blocks = packed.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        values = scale * blocks[:, 2:].view(np.int8)
    elif kind == gguf.GGMLQuantizationType.Q4_1:
        blocks = packed.reshape(-1, 20)
        scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        values = scale * quants + minimum
    else:
        values = packed.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values))


def tokens_and_merges():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "o r", "Ġw or"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = special + letters + merged
    return [*tokens, *(f"<unused{i}>" for i in range(VOCAB - len(tokens)))], merges


def write_gguf(path, *, architecture="llama", drop=(), extra=None, pre="smollm", hidden=HIDDEN, **metadata):
    """A GGUF file as llama.cpp's converter writes it. The expected tensors, by Meta's names, in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    tokens, merges = tokens_and_merges()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    random = np.random.default_rng(0)
    expected = {}
    for meta, (name, shape, kind) in {**META_TO_GGUF, **(extra or {})}.items():
        if meta in drop:
            continue
        packed = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        expected[f"{meta}.weight"] = by_hand(packed, kind).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
