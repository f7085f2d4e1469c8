"""What the files beside a tokenizer add to it, and what of that a model's embedding has no row for."""

import json

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from llama_tp.text import Message, chat_format, load_tokenizer
from tests import tiny_text
from tests.tiny_chat import make_chat_tokenizer

MAKERS = {
    "tokenizer.json": tiny_text.make_tokenizer_json,
    "metaspace": tiny_text.make_metaspace_json,
    "sentencepiece": tiny_text.make_sentencepiece_model,
}
every_kind = pytest.mark.parametrize("kind", MAKERS)


def describe(content, **flags):
    every = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **every, **flags}


def update_config(folder, **values):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.fixture
def made(tmp_path, kind):
    """(path, number of ids) of a tokenizer without added tokens of its own beside it."""
    path = MAKERS[kind](tmp_path)
    return path, load_tokenizer(path).vocab_size


@every_kind
@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_only_the_files_beside_add_are_tokens(made, place):
    path, size = made
    if place == "added_tokens.json":
        (path.parent / place).write_text(json.dumps({"<|end|>": size, "<obs>": size + 1}))
    else:
        added = {size: describe("<|end|>", special=True), size + 1: describe("<obs>")}
        update_config(path.parent, added_tokens_decoder=added)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.special_ids["<|end|>"] == size
    assert tokenizer.token_bytes(size) == b""
    assert tokenizer.token_bytes(size + 1) == b"<obs>"
    ids = tokenizer.encode("the<|end|> <obs>")
    assert ids[-1] == size + 1
    assert size not in ids
    assert tokenizer.decode(ids) == "the<|end|> <obs>"


def test_they_are_found_where_transformers_finds_them(tmp_path):
    path = tiny_text.make_tokenizer_json(tmp_path)
    size = load_tokenizer(path).vocab_size
    added = {
        size: describe("<|end|>", special=True, rstrip=True),
        size + 1: describe("<obs>", lstrip=True),
        size + 2: describe("ob", single_word=True),
    }
    update_config(tmp_path, added_tokens_decoder=added, eos_token="<|im_end|>")
    template = "{% for m in messages %}{{ m.content + '<|end|>  \n' }}{% endfor %}"
    update_config(tmp_path, chat_template=template)
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(path)
    for text in ("a  <obs>b", "ob <obs>", "the <obs><obs>  ob"):
        assert tokenizer.encode(text) == oracle.encode(text)
        dialog = [{"role": "user", "content": text}, {"role": "user", "content": text}]
        ids = oracle.apply_chat_template(dialog, return_dict=False)
        assert chat_format("jinja", tokenizer).encode([Message(**turn) for turn in dialog]) == ids
        assert {size, size + 1} & set(ids)


def test_added_text_in_a_sentencepiece_vocabulary_is_found_where_transformers_finds_it(tmp_path):
    oracle = make_chat_tokenizer(tmp_path, "llama2")
    oracle.add_tokens([AddedToken("<obs>", normalized=False)])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    size = oracle.convert_tokens_to_ids("<obs>")
    update_config(tmp_path, added_tokens_decoder={**config["added_tokens_decoder"], size: describe("<obs>")})
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the<obs>dog", "<obs> the", "<obs><obs>"):
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_a_sentencepiece_vocabulary_refuses_tokens_that_only_tokenizer_json_can_describe(tmp_path, flag):
    path = tiny_text.make_sentencepiece_model(tmp_path)
    size = load_tokenizer(path).vocab_size
    update_config(tmp_path, added_tokens_decoder={size: describe("<obs>", **{flag: True})})
    with pytest.raises(
        ValueError, match=rf"tokenizer\.model: .*adds '<obs>' with .*{flag}.*pass the model's tokenizer\.json"
    ):
        load_tokenizer(path)


@every_kind
def test_a_token_with_two_ids_is_refused(made):
    path, size = made
    update_config(path.parent, added_tokens_decoder={5: describe("<odd>"), size: describe("<|end|>", special=True)})
    with pytest.raises(ValueError, match=rf"{path.name}.* id 5"):
        load_tokenizer(path)


@every_kind
def test_added_tokens_decoder_of_another_form_is_refused(made):
    update_config(made[0].parent, added_tokens_decoder={"five": "<odd>"})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_decoder must map ids to tokens"):
        load_tokenizer(made[0])


@every_kind
def test_stop_ids_of_another_form_are_refused(made):
    (made[0].parent / "generation_config.json").write_text('{"eos_token_id": ["2"]}')
    with pytest.raises(
        ValueError, match=r'generation_config\.json: eos_token_id=\["2"\] must be an id or a list of ids'
    ):
        load_tokenizer(made[0])


def test_a_tokenizer_json_that_lacks_ids_in_between_is_refused(tmp_path):
    path = tiny_text.make_tokenizer_json(tmp_path)
    size = load_tokenizer(path).vocab_size
    update_config(tmp_path, added_tokens_decoder={size + 7: describe("<|end|>", special=True)})
    with pytest.raises(
        ValueError, match=rf"'<\|end\|>' should have id {size + 7}, but the vocabulary continues at {size}"
    ):
        load_tokenizer(path)


def test_a_named_token_is_special_though_the_vocabulary_has_it_as_a_word(tmp_path):
    path = tiny_text.make_metaspace_json(tmp_path)
    definition = json.loads(path.read_text())
    size = len(definition["model"]["vocab"])
    definition["model"]["vocab"]["[PAD]"] = size
    path.write_text(json.dumps(definition))
    update_config(tmp_path, pad_token="[PAD]", chat_template="{{ pad_token }}a")
    tokenizer = load_tokenizer(path)
    assert tokenizer.special_ids["[PAD]"] == size
    assert size not in tokenizer.encode("[PAD]")
    assert chat_format("auto", tokenizer).encode([Message("user", "x")])[0] == size


@every_kind
def test_a_word_of_the_language_stays_text_whatever_it_is_named_as(made):
    path, _ = made
    update_config(path.parent, pad_token="t", additional_special_tokens=["h"], chat_template="{{ pad_token }}")
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("that !")) == "that !"
    assert tokenizer.decode(chat_format("auto", tokenizer).encode([Message("user", "x")])) == "t"


def test_llama3s_reserved_tokens_have_the_names_that_the_files_beside_give_them(tmp_path):
    path = tiny_text.make_tiktoken_model(tmp_path)
    plain = load_tokenizer(path)
    reserved = plain.special_ids["<|reserved_special_token_0|>"]
    added = {reserved: describe("<|call|>", special=True), plain.vocab_size: describe("<|pad|>", special=True)}
    update_config(tmp_path, added_tokens_decoder=added, eos_token="<|eot_id|>", pad_token="<|pad|>")
    tokenizer = load_tokenizer(path)
    assert tokenizer.special_ids["<|call|>"] == tokenizer.special_ids["<|reserved_special_token_0|>"] == reserved
    assert tokenizer.special_ids["<|pad|>"] == plain.vocab_size
    assert tokenizer.eos_id == tokenizer.special_ids["<|eot_id|>"]
    update_config(tmp_path, added_tokens_decoder={5: describe("<odd>")})
    with pytest.raises(ValueError, match=r"tokenizer\.model: the files next to it add '<odd>'.*tokenizer\.json"):
        load_tokenizer(path)


# --- beyond the embedding


@pytest.fixture
def padded(made):
    """(path, rows of the embedding): a tokenizer with tokens behind the last row, special and as text."""
    path, size = made
    added = {size: describe("<pad>", special=True), size + 1: describe("<obs>")}
    update_config(path.parent, added_tokens_decoder=added, pad_token="<pad>")
    return path, size


@every_kind
def test_added_tokens_beyond_the_embedding_are_no_tokens_of_the_model(padded):
    path, rows = padded
    assert load_tokenizer(path).vocab_size == rows + 2
    tokenizer = load_tokenizer(path, embedding_rows=rows)
    assert tokenizer.vocab_size == rows
    assert tokenizer.beyond_embedding == {"<pad>": rows, "<obs>": rows + 1}
    text = "the <pad> and <obs>"
    assert max(tokenizer.encode(text)) < rows
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(rows + 1) == b""
    one_more = load_tokenizer(path, embedding_rows=rows + 1)
    assert one_more.special_ids["<pad>"] == rows
    assert max(one_more.encode(text)) < rows


@every_kind
def test_a_template_that_writes_such_a_token_fails_by_name_and_a_content_may(padded):
    path, rows = padded
    (path.parent / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    text = "a <pad> b"
    tokenizer = load_tokenizer(path, embedding_rows=rows)
    assert tokenizer.decode(chat_format("auto", tokenizer).encode([Message("user", text)])) == text
    (path.parent / "chat_template.jinja").write_text("{{ pad_token }}")
    with pytest.raises(RuntimeError, match=f"emits '<pad>', whose id {rows} the model lacks"):
        chat_format("auto", load_tokenizer(path, embedding_rows=rows)).encode([Message("user", "x")])


@every_kind
@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_model_without_a_row_for_bos_or_eos_is_refused(padded, name):
    path, rows = padded
    update_config(path.parent, **{name: "<pad>"})
    with pytest.raises(
        ValueError, match=rf"{path.name}: {name[:3].upper()} has id {rows}, .*embedding has {rows} rows"
    ):
        load_tokenizer(path, embedding_rows=rows)


@every_kind
def test_ids_that_cannot_be_sampled_end_nothing(padded):
    path, rows = padded
    expected = load_tokenizer(path, embedding_rows=rows).stop_ids
    (path.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": [*expected, rows, 10**6]}))
    assert load_tokenizer(path, embedding_rows=rows).stop_ids == expected


@every_kind
def test_a_vocabulary_larger_than_the_embedding_is_another_model_s(made):
    path, size = made
    base = size - 5  # none of the kinds has that many added tokens at its end
    with pytest.raises(ValueError, match=rf"{path.name} has \d+ tokens but the model's embedding has {base} rows"):
        load_tokenizer(path, embedding_rows=base)
