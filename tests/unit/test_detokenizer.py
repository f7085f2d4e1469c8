from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.text import Detokenizer, TextStream
from tests.unit.text_fixtures import KINDS, quick, texts, tiny


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, and many that are single bytes of one multi-byte character, specials, or no token at all."""
    tokenizer = tiny(kind)
    high_bytes = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1] >= b"\x80"]
    specials = sorted(tokenizer.special_ids.values())
    anything = st.integers(0, tokenizer.vocab_size + 3)
    return st.lists(anything | st.sampled_from(high_bytes) | st.sampled_from(specials), max_size=20)


kinds_and_ids = st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), ids_of(kind)))


@quick
@given(kinds_and_ids)
def test_pushes_and_flush_are_decode_for_any_ids(kind_and_ids):
    kind, ids = kind_and_ids
    detokenizer = Detokenizer(tiny(kind))
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tiny(kind).decode(ids)


@quick
@given(text=texts, kind=st.sampled_from(KINDS))
def test_no_push_ever_emits_half_a_character(text, kind):
    tokenizer = tiny(kind)
    detokenizer = Detokenizer(tokenizer)
    emitted = ""
    for token_id in tokenizer.encode(text):
        emitted += detokenizer.push(token_id)
        assert text.startswith(emitted)
    assert emitted == text
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_an_emoji_arrives_in_one_piece_with_its_last_byte(kind):
    tokenizer = tiny(kind)
    ids = tokenizer.encode("😀")
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert len(ids) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_character_is_flushed_as_one_replacement(kind):
    detokenizer = Detokenizer(tiny(kind))
    ids = tiny(kind).encode("a😀")
    assert "".join(map(detokenizer.push, ids[:-1])) == "a"
    assert detokenizer.flush() == "\ufffd"


@quick
@given(data=st.data(), text=texts, kind=st.sampled_from(KINDS), streamed=st.booleans())
def test_a_text_and_its_continuation_are_the_whole_text(data, text, kind, streamed):
    tokenizer = tiny(kind)
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before, rest = tokenizer.encode("", bos=tokenizer.adds_bos) + ids[:cut], ids[cut:]
    start = b"".join(map(tokenizer.token_bytes, before)).decode(errors="ignore")
    start = start.removeprefix(" ") if tokenizer.drops_leading_space else start
    stream = TextStream(tokenizer, after=before) if streamed else Detokenizer(tokenizer, before)
    assert start + "".join(map(stream.push, rest)) + stream.flush() == text


def test_a_completion_keeps_the_space_in_front_of_its_first_word_and_an_answer_does_not():
    for kind in ("sentencepiece", "metaspace"):
        tokenizer = tiny(kind)
        prompt, word = tokenizer.encode("the dog", bos=True), tokenizer.encode("and")
        assert tokenizer.token_bytes(word[0]) == b" and"
        assert run(TextStream(tokenizer, after=prompt), word) == [" and", ""]
        assert run(TextStream(tokenizer), word) == ["and", ""]
        assert run(TextStream(tokenizer, after=[tokenizer.bos_id]), word) == ["and", ""]  # no text precedes it


def test_a_stop_string_may_begin_with_the_space_between_a_prompt_and_its_completion():
    tokenizer = tiny("sentencepiece")
    stream = TextStream(tokenizer, [" and"], after=tokenizer.encode("the dog"))
    assert "".join(run(stream, tokenizer.encode("and the"))) == ""
    assert stream.stopped


def test_a_stream_tells_which_stop_string_it_found():
    tokenizer = tiny("tiktoken")
    for stops, found in [(["x", "b"], "b"), (["b", "ab"], "ab"), (["bc", "ab"], "ab"), (["x"], None), ([], None)]:
        stream = TextStream(tokenizer, stops)
        run(stream, tokenizer.encode("aabc"))
        assert stream.stop_string == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_a_prompt_leaves_unfinished_is_finished(kind):
    tokenizer = tiny(kind)
    ids = tokenizer.encode("a😀b")
    for cut in range(1, len(ids)):
        if b"".join(map(tokenizer.token_bytes, ids[:cut])).endswith("😀".encode()[:3]):
            detokenizer = Detokenizer(tokenizer, ids[:cut])
            assert [detokenizer.push(i) for i in ids[cut:]] == ["😀", "b"]
            return
    raise AssertionError("no cut in the middle of the emoji")


def run(stream: TextStream, ids: list[int]) -> list[str]:
    emitted = []
    for token_id in ids:
        emitted.append(stream.push(token_id))
    return [*emitted, stream.flush()]


def until_first_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of several, before the longest."""
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, minus_length = min(ends)
    return text[: end + minus_length]


few_letters = st.text("ab ", min_size=0, max_size=30)
stop_lists = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


@quick
@given(text=few_letters, stops=stop_lists, kind=st.sampled_from(KINDS))
def test_the_stream_is_the_text_before_the_first_stop_string(text, stops, kind):
    stream = TextStream(tiny(kind), stops)
    emitted = run(stream, tiny(kind).encode(text))
    assert "".join(emitted) == until_first_stop(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


@quick
@given(kinds_and_ids, st.lists(st.sampled_from(["\ufffd", "\ufffd\ufffd", " a", "é", "<"]), max_size=2))
def test_the_stream_is_right_for_ids_that_are_no_text(kind_and_ids, stops):
    kind, ids = kind_and_ids
    assert "".join(run(TextStream(tiny(kind), stops), ids)) == until_first_stop(tiny(kind).decode(ids), stops)


@quick
@given(text=few_letters, stops=stop_lists, kind=st.sampled_from(KINDS))
def test_nothing_that_could_begin_a_stop_string_is_emitted_early_and_nothing_else_is_held(text, stops, kind):
    tokenizer = tiny(kind)
    stream, plain = TextStream(tokenizer, stops), Detokenizer(tokenizer)
    emitted = received = ""
    for token_id in tokenizer.encode(text):
        emitted += stream.push(token_id)
        received += plain.push(token_id)
        if stream.stopped:
            break
        prefixes = (stop[:n] for stop in stops for n in range(1, len(stop)) if received.endswith(stop[:n]))
        held = max(prefixes, key=len, default="")
        assert emitted + held == received


def test_stop_strings_that_overlap_themselves_are_found_in_every_short_text():
    tokenizer = tiny("tiktoken")
    words = ["".join(letters) for n in range(1, 8) for letters in product("ab", repeat=n)]
    for stop in (word for word in words if 2 <= len(word) <= 4):
        for text in words:
            emitted = run(TextStream(tokenizer, [stop]), tokenizer.encode(text))
            assert "".join(emitted) == text.split(stop)[0], (text, stop)


def test_a_stop_string_across_token_borders_does_not_leak():
    tokenizer = tiny("tiktoken")
    ids = tokenizer.encode("say\nUser: hi")
    stream = TextStream(tokenizer, ["\nUser:"])
    emitted = run(stream, ids)
    assert "".join(emitted) == "say"
    assert "\n" not in "".join(emitted)
    assert stream.stopped


def test_held_back_text_is_released_by_flush_when_the_stop_string_never_comes():
    tokenizer = tiny("tiktoken")
    stream = TextStream(tokenizer, ["###"])
    *pushed, flushed = run(stream, tokenizer.encode("a##"))
    assert "".join(pushed) == "a"
    assert flushed == "##"
    assert not stream.stopped


def test_nothing_is_emitted_after_a_stop_string():
    tokenizer = tiny("tiktoken")
    stream = TextStream(tokenizer, ["."])
    assert "".join(run(stream, tokenizer.encode("one. two. three"))) == "one"
    assert stream.push(tokenizer.encode("x")[0]) == ""
    assert stream.flush() == ""


@quick
@given(text=few_letters, stops=stop_lists, min_tokens=st.integers(0, 12), kind=st.sampled_from(KINDS))
def test_the_first_min_tokens_tokens_are_not_searched(text, stops, min_tokens, kind):
    tokenizer = tiny(kind)
    ids = tokenizer.encode(text)
    emitted = run(TextStream(tokenizer, stops, min_tokens=min_tokens), ids)
    plain = run(TextStream(tokenizer), ids)
    assert emitted[:min_tokens] == plain[:min_tokens]
    assert "".join(emitted[min_tokens:]) == until_first_stop("".join(plain[min_tokens:]), stops)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(tiny("tiktoken"), ["ok", ""])


@quick
@given(kinds_and_ids)
def test_with_specials_the_text_has_their_pieces(kind_and_ids):
    """Each special token splits the text: what is between them is decoded as ever, but for characters cut in two."""
    kind, ids = kind_and_ids
    tokenizer = tiny(kind)
    pieces = {token_id: piece for piece, token_id in tokenizer.special_ids.items()}
    detokenizer = Detokenizer(tokenizer, specials=True)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    raw = b"".join(pieces[one].encode() if one in pieces else tokenizer.token_bytes(one) for one in ids)
    expected = raw.decode("utf-8", "replace")
    assert text in (expected, expected.removeprefix(" "))


@pytest.mark.parametrize("stops", [["fox"], ["fox", "brown fox"], ["x"]])
def test_a_stop_string_may_stay_in_the_text(stops):
    tokenizer = tiny("sentencepiece")
    ids = tokenizer.encode("The quick brown fox jumps")

    def text(**options):
        stream = TextStream(tokenizer, stops, **options)
        return "".join(map(stream.push, ids)) + stream.flush()

    assert text(keep_stop=True) == "The quick brown fox"
    assert text(keep_stop=True) in {text() + stop for stop in stops}
