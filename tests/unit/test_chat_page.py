"""The chat page as it is served. What it does in a browser: tests/e2e/test_chat_page.py."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.page.assembly import chat_page

FOLDER = files("llama_tp.serving.page")


class Page(HTMLParser):
    """The elements of the page, with their attributes, and the text of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.raw = [], {"script": [], "style": []}
        self._open = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open in self.raw:
            self.raw[self._open][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page():
    return Page(chat_page().body.decode())


def directives(policy):
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


def test_the_policy_admits_the_page_s_own_scripts_and_style_and_nothing_else(page):
    document = chat_page()
    (meta,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    header = document.headers["content-security-policy"]
    assert header == f"{meta}; frame-ancestors 'none'"
    policy = directives(header)
    hashes = {
        tag: {f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts}
        for tag, texts in page.raw.items()
    }
    assert len(hashes["script"]) > 5
    assert set(policy.pop("script-src")) == hashes["script"]
    assert set(policy.pop("style-src")) == hashes["style"]
    assert policy == {
        "default-src": ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["dompurify"],
    }


def test_the_page_refers_to_no_other_file_and_has_no_inline_handlers(page):
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in {"src", "srcset", "href", "action", "data"} & attributes.keys():
            assert attributes[name].startswith(("#", "data:")), (tag, name)
    assert "url(" not in page.raw["style"][0]
    assert "@import" not in page.raw["style"][0]
    assert "sourceMappingURL" not in chat_page().body.decode()


def test_scripts_set_text_and_nodes_never_html(page):
    for path in FOLDER.joinpath("scripts").iterdir():
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )


def test_every_script_in_the_folder_is_in_the_page(page):
    scripts = {path.read_text() for path in FOLDER.joinpath("scripts").iterdir()}
    assert scripts <= set(page.raw["script"])


def test_every_label_and_description_has_its_field(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("label"):
        assert attributes["for"] in ids
    for _, attributes in page.elements:
        for name in {"aria-describedby", "aria-labelledby", "aria-controls"} & attributes.keys():
            assert set(attributes[name].split()) <= set(ids)


def test_the_page_has_a_field_for_every_sampling_parameter_with_its_range(page):
    fields = {one["name"]: one for one in page.all("input") if one.get("type") == "number"}
    assert {knob.name for knob in KNOBS} < fields.keys()
    for knob in KNOBS:
        field = fields[knob.name]
        assert (float(field["min"]), float(field["max"])) == (knob.api.low, knob.api.high), knob.name
        assert field["step"] == ("1" if knob.kind is int else "any")


def test_the_vendored_files_are_those_of_the_table():
    vendor = FOLDER.joinpath("vendor")
    table = dict(
        re.findall(r"^\| `([\w.-]+\.js)` .*`([0-9a-f]{64})` \|$", vendor.joinpath("README.md").read_text(), re.M)
    )
    hashes = {
        path.name: sha256(path.read_bytes()).hexdigest() for path in vendor.iterdir() if path.name.endswith(".js")
    }
    assert hashes == table
    assert len(hashes) == 3


def test_every_icon_that_is_used_is_in_the_sheet(page):
    sheet = {one["id"].removeprefix("icon-") for one in page.all("symbol")}
    used = {one["href"].removeprefix("#icon-") for one in page.all("use")}
    for path in FOLDER.joinpath("scripts").iterdir():
        used |= set(re.findall(r'(?:\bicon\("|iconButton\("|#icon-)([a-z]+)', path.read_text()))
    assert used == sheet
