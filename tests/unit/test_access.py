"""The API key: who gets in, and what becomes of it in files."""

from __future__ import annotations

import pytest

from llama_tp.serving.access import Access, credentials_in, read_key, valid_key
from llama_tp.serving.errors import ApiError


@pytest.mark.parametrize(
    ("headers", "credentials"),
    [
        ({"Authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"X-Api-Key": "k"}, "k"),
        ({"Authorization": "Bearer of-torchserve", "x-api-key": "k"}, "k"),
        ({"Authorization": "Basic k"}, None),
        ({"Authorization": "k"}, None),
        ({"data": {"content-type": ""}}, None),
        ({}, None),
    ],
)
def test_credentials_are_found_where_openai_s_and_anthropic_s_clients_send_them(headers, credentials):
    assert credentials_in(headers) == credentials


@pytest.mark.parametrize("credentials", [None, "", "K", "kk", "k\x00", "ключ", "\ud800"])
def test_other_credentials_are_refused_and_not_repeated(credentials):
    with pytest.raises(ApiError) as caught:
        Access("k").check(credentials, "v1/models")
    error = caught.value
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.fields()["type"] == "invalid_request_error"
    assert not credentials or len(credentials) < 2 or credentials not in error.message


def test_the_key_opens_every_route_and_the_page_needs_none():
    Access("k").check("k", "")
    Access("k").check("k", "no/such")
    Access("k").check(None, "chat")
    assert "secret" not in str(vars(Access("secret")))


@pytest.mark.parametrize("text", ["k", "k\n", "\nk\r\n", " k "])
def test_a_key_file_is_one_line(tmp_path, text):
    (tmp_path / "key").write_text(text)
    assert read_key(tmp_path / "key") == "k"


@pytest.mark.parametrize("data", [b"", b"\n", b"a b", b"first\nsecond", "ключ".encode(), b"k\0", b"x" * 2000])
def test_what_no_header_can_carry_is_refused_without_being_repeated(tmp_path, data):
    (tmp_path / "key").write_bytes(data)
    with pytest.raises(ValueError, match="api_key_file=") as caught:
        read_key(tmp_path / "key")
    assert "\n" not in str(caught.value)
    assert "first" not in str(caught.value)
    assert "xxx" not in str(caught.value)


def test_a_typed_key_is_checked_likewise():
    assert valid_key("sk-1", "the API key") == "sk-1"
    with pytest.raises(ValueError, match="the API key is empty"):
        valid_key("", "the API key")
