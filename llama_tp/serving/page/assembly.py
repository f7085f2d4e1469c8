"""Assembles the chat page from the files in this folder: one HTML document that loads nothing else.

Its Content-Security-Policy (https://www.w3.org/TR/CSP3/) names the hash of each script and of the style sheet, so the
browser runs no others, and lets the page connect to its own origin only. With `require-trusted-types-for`, browsers
also refuse text where HTML is expected, unless it comes from the sanitizer.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from llama_tp.serving.document import Document
from llama_tp.serving.operation import Operation

_FOLDER = files("llama_tp.serving.page")
_HEAD = ("scripts/theme.js",)
"""Run before the page is painted."""
_BODY = (
    "vendor/markdown-it.umd.min.js",
    "vendor/purify.min.js",
    "vendor/highlight.min.js",
    *(f"scripts/{name}.js" for name in ("elements", "events", "markdown", "conversation", "history")),
    *(f"scripts/{name}.js" for name in ("server", "generation", "settings", "view", "app")),
)
"""In this order: they share one scope."""


def chat_page() -> Document:
    """The page, with the policy as a header as well: in a meta element, browsers ignore `frame-ancestors`."""
    style = _read("page.css")
    head, body = ([_script(name) for name in names] for names in (_HEAD, _BODY))
    policy = _policy([*head, *body], style)
    parts = {"policy": policy, "style": style, "head_scripts": _elements(head), "body_scripts": _elements(body)}
    html = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], _read("page.html"))
    headers = {
        "content-security-policy": f"{policy}; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    operation = Operation(id="chat_page", summary="A page to chat with the model.", answer=str, answer_type="text/html")
    return Document(html.encode(), operation, "text/html; charset=utf-8", headers)


def _read(name: str) -> str:
    return _FOLDER.joinpath(name).read_text(encoding="utf-8")


def _script(name: str) -> str:
    """A script's text, without a reference to its source map, which is not served.

    "<script" in its strings and regular expressions is escaped: a browser could take it for the end of the element
    (https://html.spec.whatwg.org/multipage/scripting.html#restrictions-for-contents-of-script-elements).
    """
    text = re.sub(r"\n//# sourceMappingURL=.*\s*$", "\n", _read(name))
    assert "\r" not in text, f"{name}: browsers change the line ends, and so the hash"
    return re.sub(r"<(?=/?script)", r"\\x3c", text, flags=re.IGNORECASE)


def _elements(scripts: list[str]) -> str:
    return "\n".join(f"<script>{script}</script>" for script in scripts)


def _policy(scripts: list[str], style: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_source, scripts))}",
            f"style-src {_source(style)}",
            "connect-src 'self'",
            "img-src data:",  # the page's icon
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    )


def _source(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
