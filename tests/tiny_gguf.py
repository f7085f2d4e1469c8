"""GGUF files as llama.cpp's converter writes them, and what their bytes mean."""

from __future__ import annotations

import math

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


def write_gguf(
    path,
    *,
    architecture="llama",
    drop=(),
    extra=None,
    raw=None,
    pre="smollm",
    hidden=HIDDEN,
    heads=HEADS,
    layers=1,
    **metadata,
):
    """A GGUF file as llama.cpp's converter writes it. The expected tensors, by Meta's names, in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
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
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key.replace("__", "."), value)
    if raw is not None:
        writer.add_tensor(*raw)
    random = np.random.default_rng(0)
    expected = {}
    for meta, (name, shape, kind) in {**META_TO_GGUF, **(extra or {})}.items():
        if meta in drop:
            continue
        packed = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", packed, raw_dtype=kind)
        expected[f"{meta}.weight"] = by_hand(packed, kind).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_model(path, model, *, scaling=None, tokenizer=None, kind="F32", kinds=None, **options):
    """A model of transformers, as llama.cpp's converter writes it. `options` of GGUFWriter split it.

    scaling: of Llama 3.1, as a tensor of factors
    tokenizer: writes the tokenizer's metadata to the writer
    kind: type of matrices, by its name
    kinds: other types, by the ends of tensors' names without ".weight"; of Q4_K and Q6_K the values are random
    """
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, **options)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    if tokenizer is not None:
        tokenizer(writer)
    if scaling is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors(config, head_dim, **scaling))
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 9)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, parameter = name.rpartition(".")
        values = tensor.float().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = permuted(values, heads)
        theirs = names.get_name(stem)
        of_matrix = next((other for end, other in (kinds or {}).items() if theirs.endswith(end)), kind)
        packed_as = gguf.GGMLQuantizationType[of_matrix if values.ndim == 2 else "F32"]
        pack = random_blocks if packed_as.name in _SCALES_AT else gguf.quants.quantize
        writer.add_tensor(f"{theirs}.{parameter}", pack(np.ascontiguousarray(values), packed_as), raw_dtype=packed_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_SCALES_AT = {"Q4_K": (0, 2), "Q6_K": (208,)}
"""Where float16 scales lie in the blocks of types that the gguf package reads but does not write."""


def random_blocks(values, kind):
    """Blocks for as many values: random bytes, and scales that give values of about 0.1."""
    size, num_bytes = gguf.constants.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (values.size // size, num_bytes), dtype=np.uint8)
    for at in _SCALES_AT[kind.name]:
        scales = random.uniform(1e-5, 1e-4, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(len(values), -1)


def permuted(values, heads):
    """Rotated halves become neighbours: `permute` of
    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def rope_factors(config, head_dim, *, factor, low=1.0, high=4.0, original=8192):
    """`generate_extra_tensors` of the same script, one wavelength at a time."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * config.rope_parameters["rope_theta"] ** (index / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        factors.append(1 / ((1 - smooth) / factor + smooth) if 0 <= smooth <= 1 else 1 if smooth > 1 else factor)
    return np.array(factors, dtype=np.float32)


def add_sentencepiece(writer, library, *, bos=None, eos=None):
    """A sentencepiece model's tokenizer as llama.cpp's converter writes it (`_create_vocab_sentencepiece`)."""
    kinds = gguf.TokenType
    types = [
        kinds.UNKNOWN
        if library.is_unknown(i)
        else kinds.CONTROL
        if library.is_control(i)
        else kinds.UNUSED
        if library.is_unused(i)
        else kinds.BYTE
        if library.is_byte(i)
        else kinds.NORMAL
        for i in range(library.vocab_size())
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([library.id_to_piece(i) for i in range(library.vocab_size())])
    writer.add_token_scores([library.get_score(i) for i in range(library.vocab_size())])
    writer.add_token_types(types)
    writer.add_bos_token_id(library.bos_id() if bos is None else bos)
    writer.add_eos_token_id(library.eos_id() if eos is None else eos)


def add_byte_level_bpe(writer, vocab, merges, pre, *, control=(), user_defined=(), rows=None):
    """A byte-level BPE as llama.cpp's converter writes it (`get_vocab_base`), padded to the embedding's rows."""
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if token in control else 4 if token in user_defined else 1 for token in tokens]
    padding = max((rows or 0) - len(tokens), 0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(padding))])
    writer.add_token_types([*types, *[5] * padding])
    writer.add_token_merges([" ".join(pair) for pair in merges])
