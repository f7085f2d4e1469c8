"""The chat page in a real browser: first against scripted answers, then against TorchServe with the demo's model.

axe-core is the oracle for accessibility, the browser itself for what runs and what is fetched.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.chat_stub import PATH, Answer, Stub, delta, event, refused, serve_stub, streamed, usage
from tests.e2e.chromium import launched
from tests.waiting import PATIENCE_S, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.e2e

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
MARKDOWN = """## A heading

Some **bold** text, `code` and a [link](https://example.org/).

```python
def factorial(n): return 1 if n <= 1 else n * factorial(n - 1)  # longer than any phone is wide
```

| left | right |
|:-----|------:|
| 1 | 24329020081766400002432902008176640000 |

> quoted

1. one
2. two
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve_stub() as stub:
        yield stub


@pytest.fixture
def visit(browser: Browser, stub: Stub) -> Iterator[Callable[..., Page]]:
    """Opens the page in a browser without a past. At the end, nothing may have failed or been asked of others."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_S * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda message: wrong.append(message.text) if "Policy" in message.text else None)
        origin = stub.url.removesuffix(f"{PATH}/chat")
        page.on("request", lambda request: None if is_own(request.url, origin) else wrong.append(request.url))
        page.goto(stub.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def is_own(url: str, origin: str) -> bool:
    return url.startswith((f"{origin}/", "data:image/svg+xml", f"blob:{origin}/"))


@pytest.fixture
def page(visit: Callable[..., Page]) -> Page:
    return visit()


def expect(locator: Any) -> Any:
    api.expect.set_options(timeout=PATIENCE_S * 1000)
    return api.expect(locator)


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def send(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def answer(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer").last


def completed(page: Page) -> Locator:
    """The last answer, once it has ended."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return answer(page)


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def test_an_answer_is_shown_while_it_is_streamed(stub: Stub, page: Page) -> None:
    middle = threading.Event()
    stub.answers = [
        Answer([delta("The capital"), middle, 0.1, delta(" of *France* is"), delta(" Paris.", "stop"), usage(7)])
    ]
    expect(page.get_by_role("heading", level=1)).to_have_text("llama 2,048 tokens of context")
    send(page, "What is the capital of France?")
    expect(answer(page).locator(".prose")).to_have_text("The capital")
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    middle.set()
    expect(completed(page).locator(".prose")).to_have_text("The capital of France is Paris.")
    expect(answer(page).locator(".prose em")).to_have_text("France")
    expect(answer(page).locator(".stats")).to_have_text(
        re.compile(r"^7 tokens[\d.]+ tokens/sfirst token after [\d.]+ s$")
    )
    assert stub.requests == [
        {
            "model": "llama",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    send(page, "And of Spain?")
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    assert [role for role, _ in stub.dialog] == ["user", "assistant", "user"]
    assert stub.dialog[1] == ("assistant", "The capital of *France* is Paris.")


@pytest.mark.parametrize("by_key", [True, False], ids=["Escape", "button"])
def test_a_stopped_answer_is_kept_and_the_connection_is_closed(stub: Stub, page: Page, by_key: bool) -> None:
    forever = threading.Event()
    stub.answers = [Answer(chain([delta("One, two"), forever], repeat(delta(", more"))))]
    send(page, "Count")
    expect(answer(page).locator(".prose")).to_have_text("One, two")
    page.keyboard.press("Escape") if by_key else button(page, "Stop").click()
    expect(completed(page).locator(".prose")).to_have_text("One, two")
    expect(answer(page)).to_contain_text("Stopped.")
    expect(box(page)).to_be_focused()
    forever.set()
    assert stub.disconnected.wait(PATIENCE_S)
    expect(answer(page).locator(".prose")).to_have_text("One, two")


def test_a_regenerated_answer_is_a_version_beside_the_first(stub: Stub, page: Page) -> None:
    stub.answers = [streamed("First"), streamed("Second"), streamed("Third")]
    send(page, "Say something")
    expect(completed(page)).to_contain_text("First")
    button(page, "Regenerate answer").click()
    expect(completed(page).locator(".prose")).to_have_text("Second")
    assert stub.dialog == [("user", "Say something")]
    expect(answer(page)).to_contain_text("2 / 2")
    button(page, "Previous version").click()
    expect(answer(page).locator(".prose")).to_have_text("First")
    send(page, "Go on")
    expect(completed(page).locator(".prose")).to_have_text("Third")
    assert stub.dialog[1] == ("assistant", "First")


def test_an_edited_message_starts_from_there_and_nothing_is_lost(stub: Stub, page: Page) -> None:
    stub.answers = [streamed("A"), streamed("B"), streamed("C")]
    for text in ("first", "second"):
        send(page, text)
        completed(page)
    box(page).fill("half a thought")
    page.get_by_text("first", exact=True).last.hover()
    button(page, "Edit message").first.click()
    editor = page.get_by_role("textbox", name="Edit message")
    expect(editor).to_be_focused()
    editor.fill("first, edited")
    editor.press("Enter")
    expect(completed(page).locator(".prose")).to_have_text("C")
    assert stub.dialog == [("user", "first, edited")]
    expect(page.get_by_role("article")).to_have_count(2)
    expect(box(page)).to_have_value("half a thought")
    button(page, "Previous version").click()
    expect(page.get_by_role("article")).to_have_count(4)
    expect(answer(page).locator(".prose")).to_have_text("B")


def test_an_edit_that_was_left_is_found_again(stub: Stub, page: Page) -> None:
    send(page, "first")
    completed(page)
    box(page).press("ArrowUp")
    page.get_by_role("textbox", name="Edit message").fill("half an edit")
    send(page, "second")
    completed(page)
    assert stub.dialog[0] == ("user", "first")
    page.get_by_text("first", exact=True).last.hover()
    button(page, "Edit message").first.click()
    expect(page.get_by_role("textbox", name="Edit message")).to_have_value("half an edit")


def test_a_question_without_an_answer_is_asked_with_the_next_one(stub: Stub, page: Page) -> None:
    """Chat formats want user and assistant in turn."""
    stub.answers = [refused(503, TORCHSERVE_BUSY)]
    send(page, "What is the capital of France?")
    completed(page)
    send(page, "And of Spain?")
    completed(page)
    assert stub.dialog == [("user", "What is the capital of France?\n\nAnd of Spain?")]


def test_an_answer_that_was_cut_short_is_continued(stub: Stub, page: Page) -> None:
    stub.answers = [streamed("One,", " two", finish_reason="length"), streamed(", three.")]
    send(page, "Count to three")
    expect(completed(page)).to_contain_text("Stopped at the token limit.")
    button(page, "Continue answer").click()
    expect(completed(page).locator(".prose")).to_have_text("One, two, three.")
    expect(button(page, "Continue answer")).to_be_hidden()
    expect(answer(page)).to_contain_text("3 tokens")
    assert stub.dialog[-1] == ("assistant", "One, two")
    assert (stub.requests[-1]["continue_final_message"], stub.requests[-1]["add_generation_prompt"]) == (True, False)


def error(code: str, message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


TORCHSERVE_BUSY = {
    "code": 503,
    "type": "ServiceUnavailableException",
    "message": 'Model "llama" has no worker to serve',
}


@pytest.mark.parametrize(
    ("reply", "title", "detail"),
    [
        (refused(429, error("queue_full", "4 requests are waiting")), "The server is busy", "4 requests are waiting."),
        (refused(503, TORCHSERVE_BUSY), "The server is busy", "Try again in a moment."),
        (refused(400, error("invalid_value", "seed=x must be")), "refused the request", "Seed=x must be."),
        (refused(400, error("context_length_exceeded", "too long")), "too long for this model", "Too long."),
        (refused(400, error("chat_not_supported", "no template")), "This model cannot chat", "No template."),
        (refused(413, b""), "The conversation is too large", "does not accept"),
        (refused(500, b"<html>oops"), "The server answered with status 500", ""),
        (refused(502, b"<html>bad gateway"), "The server cannot be reached", ""),
        (Answer([event(error("nan_logits", "not a number", "server_error"))]), "The server failed", "Not a number."),
        (Answer([delta("Half")]), "The answer broke off", "Half"),
        (Answer([b"data: {not json}\n\n"]), "The answer broke off", ""),
    ],
)
def test_an_error_is_shown_in_words(stub: Stub, page: Page, reply: Answer, title: str, detail: str) -> None:
    stub.answers = [reply]
    send(page, "My precious question")
    expect(completed(page)).to_contain_text(title)
    expect(answer(page)).to_contain_text(detail)
    expect(page.get_by_role("status")).to_contain_text(title)
    expect(page.get_by_role("article", name="You")).to_contain_text("My precious question")
    expect(button(page, "Try again")).to_have_count(0 if "too long" in title or "cannot chat" in title else 1)


def test_what_came_before_the_connection_broke_is_kept(stub: Stub, page: Page) -> None:
    breaks = threading.Event()
    stub.answers = [Answer([delta("Half"), breaks], breaks_off=True)]
    send(page, "My precious question")
    expect(answer(page).locator(".prose")).to_have_text("Half")
    breaks.set()
    expect(completed(page)).to_contain_text("The answer broke off")
    expect(answer(page)).to_contain_text("Half")
    expect(page.get_by_role("status")).to_contain_text("The answer broke off")
    expect(button(page, "Try again")).to_have_count(1)


def test_a_server_that_is_gone_is_asked_again_and_no_text_is_lost(stub: Stub, page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    send(page, "Hello?")
    expect(completed(page)).to_contain_text("The server cannot be reached")
    page.reload()
    expect(page.get_by_role("article", name="You")).to_contain_text("Hello?")
    page.unroute_all()
    button(page, "Try again").click()
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    expect(answer(page)).not_to_contain_text("cannot be reached")
    assert stub.dialog == [("user", "Hello?")]


def test_a_page_that_was_closed_in_mid_answer_says_so(stub: Stub, page: Page) -> None:
    stub.answers = [Answer([delta("One, two"), threading.Event()])]
    send(page, "Count")
    expect(answer(page).locator(".prose")).to_have_text("One, two")
    page.reload()
    expect(answer(page).locator(".prose")).to_have_text("One, two")
    expect(answer(page)).to_contain_text("The answer broke off")
    expect(button(page, "Continue answer")).to_be_visible()


CUT = """(stream, data) => {
  const bytes = new TextEncoder().encode(stream);
  const wrong = [];
  const check = (pieces, name) => {
    const parser = new EventParser();
    const events = pieces.flatMap((piece) => parser.push(piece));
    if (JSON.stringify(events) !== JSON.stringify(data)) wrong.push([name, events]);
  };
  for (let at = 0; at <= bytes.length; at += 1) check([bytes.slice(0, at), bytes.slice(at)], at);
  check([...bytes].map((byte) => new Uint8Array([byte])), "every byte alone");
  return wrong;
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_a_stream_may_be_cut_at_every_byte(page: Page, end: str) -> None:
    data = ['{"text": "Größe 🦙 漢字: data"}', "two\nlines", "[DONE]"]
    lines = [
        f"data: {data[0]}",
        "",
        ": a comment",
        "data: two",
        "data:lines",
        "",
        "event: x",
        "",
        "id",
        "",
        "data: [DONE]",
    ]
    wrong = page.evaluate(f"([stream, data]) => ({CUT})(stream, data)", [end.join([*lines, "", ""]), data])
    assert wrong == []


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '<svg onload="window.hacked = 1"><script>window.hacked = 1</script></svg>',
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    '<iframe src="https://evil.example/"></iframe><object data="https://evil.example/"></object>',
    "<style>@import url(https://evil.example/x.css); body { display: none }</style>",
    "<base href=https://evil.example/><meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<form action=https://evil.example/><input name=token autofocus onfocus='window.hacked = 1'></form>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.hacked=1&gt;'>",
    "<a href='javascript:window.hacked=1'>click me</a> <details open ontoggle=window.hacked=1>",
    "[one](javascript:window.hacked=1) [two](JaVaScRiPt:window.hacked=1) [three](&#106;avascript:window.hacked=1)",
    "[one](data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGFja2VkPTE8L3NjcmlwdD4=) [two](vbscript:x) [three](file:///etc)",
    "<javascript:window.hacked=1> [x]( javascript:window.hacked=1 ) [y][z]\n\n[z]: javascript:window.hacked=1 'title'",
    "[blob](blob:https://evil.example/1) [rel](../../../admin) [proto](//evil.example/) [page](#composer-text)",
    "![track](https://evil.example/pixel.png) ![data](data:image/svg+xml,<svg/onload=window.hacked=1>) ![x](x)",
    '[t](https://example.org/ "\'onmouseover=window.hacked=1 x=\'") [u](https://example.org/"onclick=window.hacked=1)',
    '```html\n<script>window.hacked = 1</script>\n```\n\n```"><img/src=x/onerror=window.hacked=1>\ncode\n```',
    "<div id=composer-text name=send class=skip style='position:fixed;inset:0;background:url(https://evil.example/)'>",
    "|a|\n|-|\n|<img src=x onerror=window.hacked=1>|\n\n# <b onclick=window.hacked=1>head</b>",
    "&lt;img src=x onerror=window.hacked=1&gt; &#x3c;script&#x3e;window.hacked=1&#x3c;/script&#x3e; \x00\ufeff\u2028",
    "<<script>script>window.hacked=1<</script>/script> <!--><script>window.hacked=1</script>--> <![CDATA[<script>]]>",
]
SAFE_ELEMENTS = (
    "p br hr h3 h4 h5 h6 ul ol li blockquote pre code em strong s a table thead tbody tr th td div span button svg use"
)
INSPECT = """() => {
  const found = [...document.querySelectorAll(".prose *")];
  const attributes = found.flatMap((e) => [...e.attributes].map((a) => [e.localName, a.name, a.value]));
  return { names: [...new Set(found.map((e) => e.localName))], attributes, hacked: window.hacked ?? null };
}"""


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_model_writes_is_never_run_loaded_or_taken_for_html(stub: Stub, page: Page, text: str) -> None:
    """`visit` asserts that nothing was fetched elsewhere, and that the policy, the second wall, had nothing to stop."""
    stub.answers = [streamed(*text)]
    send(page, text)
    completed(page)
    for at in range(answer(page).locator("a").count()):
        answer(page).locator("a").nth(at).hover()
    seen = page.evaluate(INSPECT)
    assert seen["hacked"] is None
    assert set(seen["names"]) <= set(SAFE_ELEMENTS.split())
    for element, name, value in seen["attributes"]:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "style", "id", "name", "action", "srcdoc", "formaction")
        if name == "href" and element != "use":
            assert re.match(r"https?://|mailto:", value)
    for link in answer(page).locator("a[href]").all():
        assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")
    expect(page.get_by_role("article", name="You").locator(".bubble > *")).to_have_count(0)


def test_tags_in_an_answer_are_shown_as_text(stub: Stub, page: Page) -> None:
    stub.answers = [streamed("Write <b>bold</b> & <script>x</script>, ![an image](https://example.org/x.png)")]
    send(page, "<i>How?</i>")
    expect(completed(page).locator(".prose")).to_have_text("Write <b>bold</b> & <script>x</script>, an image")
    expect(page.get_by_role("article", name="You").locator(".bubble")).to_have_text("<i>How?</i>")


@pytest.mark.parametrize("code", ["<script>x = 1</script>", "<b onclick='x'>&lt;</b> <!-- -->", "'</code></pre><b>'"])
@pytest.mark.parametrize("language", ["html", "js", "python", "no-such-language"])
def test_code_is_shown_as_it_was_written(stub: Stub, page: Page, language: str, code: str) -> None:
    """Colouring puts elements into it."""
    stub.answers = [streamed(f"```{language}\n", code, "\n```")]
    send(page, "Show me")
    expect(completed(page).locator("pre")).to_have_text(f"{code}\n", use_inner_text=False)
    assert (answer(page).locator("pre span").count() > 0) == (language in ("html", "js", "python"))
    expect(answer(page).locator(":is(pre script, pre b)")).to_have_count(0)


SECOND_WALL = """async () => {
  await new Promise((go) => setTimeout(go)); // what playwright calls may evaluate text, what a timer calls may not
  const passed = [];
  const attempt = async (name, act) => { try { if (await act()) passed.push(name); } catch { } };
  const add = (tag, attributes) => document.body.append(Object.assign(document.createElement(tag), attributes));
  await attempt("text for HTML", () => { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); return true; });
  await attempt("eval", () => window.eval("1"));
  await attempt("a function of text", () => new Function("return 1")());
  await attempt("another origin", () => fetch("http://127.0.0.1:9/").then(() => true));
  await attempt("a script of another origin", () => { add("script", { src: "http://127.0.0.1:9/x.js" }); });
  const style = document.createElement("style");
  style.append("body { color: rgb(1, 2, 3) }");
  document.head.append(style);
  if (getComputedStyle(document.body).color === "rgb(1, 2, 3)") passed.push("a style sheet");
  const image = new Image();
  image.src = location.origin + "/favicon.ico"; // `decode` rejects in any case; the test sees whether it is requested
  await image.decode().catch(() => {});
  return passed;
}"""


def test_the_policy_would_stop_what_got_past_the_sanitizer(browser: Browser, stub: Stub) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        urls: list[str] = []
        page.goto(stub.url)
        page.on("request", lambda request: urls.append(request.url))
        assert page.evaluate(SECOND_WALL) == []
        assert [url for url in urls if ":9/" in url or "favicon" in url] == []


def test_a_token_is_asked_for_where_the_server_wants_one(stub: Stub, visit: Callable[..., Page]) -> None:
    stub.token = "secret"
    page = visit()
    expect(page.get_by_role("alert").filter(has_text="The server wants a token")).to_be_visible()
    send(page, "Let me in")
    expect(completed(page)).to_contain_text("The token is missing, wrong, or has expired.")
    answer(page).get_by_role("button", name="Enter token").click()
    field = page.get_by_label("Access token")
    expect(field).to_be_focused()
    field.fill("secret")
    field.press("Enter")
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    expect(page.get_by_role("heading", level=1)).to_contain_text("llama")
    assert stub.dialog == [("user", "Let me in")]
    page.reload()
    send(page, "Again")
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    stored = page.evaluate("JSON.stringify(Object.entries(localStorage))")
    assert "Let me in" in stored
    assert "secret" not in stored


def test_settings_are_sent_and_empty_ones_are_not(stub: Stub, page: Page) -> None:
    button(page, "Settings").click()
    page.get_by_label("System prompt").fill("You are a pirate.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop strings").fill("\n\nEnd\n")
    page.get_by_label("Top p").fill("2")
    expect(page.get_by_role("alert").filter(has_text="less than or equal to 1")).to_be_visible()
    button(page, "Done").click()
    expect(page.get_by_label("Top p")).to_be_focused()
    page.get_by_label("Top p").fill("")
    button(page, "Done").click()
    send(page, "Ahoy")
    completed(page)
    assert stub.dialog == [("system", "You are a pirate."), ("user", "Ahoy")]
    fields = {key: value for key, value in stub.requests[-1].items() if key not in ("model", "messages")}
    assert fields == {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.3,
        "seed": 7,
        "stop": ["End"],
    }
    page.reload()
    button(page, "Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.3")
    button(page, "Reset").click()
    page.get_by_label("Top p").fill("2")
    page.keyboard.press("Escape")
    button(page, "New chat").click()
    send(page, "Hello")
    completed(page)
    assert stub.dialog == [("user", "Hello")]
    assert not {"temperature", "seed", "stop", "top_p"} & stub.requests[-1].keys()


def test_chats_are_kept_in_the_browser_listed_exported_and_deleted(stub: Stub, page: Page) -> None:
    chats = page.get_by_role("navigation").get_by_role("listitem")
    send(page, "First chat")
    completed(page)
    button(page, "New chat").click()
    send(page, "Second chat")
    completed(page)
    box(page).fill("a draft")
    assert wait_until(lambda: "a draft" in page.evaluate("JSON.stringify(Object.entries(localStorage))"))
    button(page, "New chat").click()
    box(page).fill("another draft")
    page.reload()
    expect(box(page)).to_have_value("another draft")
    expect(chats).to_have_text(["Second chat", "First chat"])
    chats.first.get_by_role("button", name="Second chat", exact=True).click()
    expect(box(page)).to_have_value("a draft")
    page.reload()
    expect(box(page)).to_have_value("a draft")
    expect(page.get_by_role("article", name="You")).to_have_text("Second chat")
    with page.expect_download() as download:
        button(page, "Export all").click()
    exported = json.loads(download.value.path().read_text())
    assert [one["shown"] for one in exported["conversations"]] == [
        [{"role": "user", "content": f"{name} chat"}, {"role": "assistant", "content": "Fine."}]
        for name in ("Second", "First")
    ]
    chats.last.hover()
    button(page, "Delete chat: First chat").click()
    expect(chats).to_have_text(["Second chat"])
    button(page, "Undo").click()
    expect(chats).to_have_count(2)
    button(page, "Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(chats).to_have_count(0)
    page.reload()
    expect(chats).to_have_count(0)


@pytest.mark.parametrize(
    "script",
    [
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }",
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError') } })",
    ],
    ids=["full", "disabled"],
)
def test_without_storage_it_still_chats(stub: Stub, page: Page, script: str) -> None:
    page.add_init_script(script)
    page.reload()
    send(page, "Hello")
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    expect(page.locator("#toasts")).to_contain_text("This browser")


def test_other_people_s_entries_in_the_storage_are_left_alone(stub: Stub, page: Page) -> None:
    prefix = f"llama-tp-chat:{PATH}/chat:chat:"
    entries = {
        f"{prefix}1": "{",
        f"{prefix}2": '{"id": "2", "messages": 5}',
        "theirs": "x",
        "llama-tp-chat:theme": "blue",
    }
    page.evaluate("(entries) => Object.entries(entries).forEach(([k, v]) => localStorage.setItem(k, v))", entries)
    page.reload()
    send(page, "Hello")
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_text(["Hello"])
    stored = page.evaluate("Object.fromEntries(Object.entries(localStorage))")
    assert entries.items() <= stored.items()


def test_the_theme_follows_the_system_until_it_is_switched(visit: Callable[..., Page]) -> None:
    page = visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    button(page, "Switch to the light theme").click()
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light
    button(page, "Switch to the dark theme").click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == light, "it follows the system again"


def test_code_and_answers_are_copied(stub: Stub, visit: Callable[..., Page]) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    stub.answers = [streamed(MARKDOWN)]
    send(page, "Show me")
    completed(page)
    button(page, "Copy answer").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    page.evaluate("Object.defineProperty(window, 'isSecureContext', { value: false })")  # as over plain HTTP
    button(page, "Copy python code").click()
    expect(page.get_by_role("status")).to_have_text(re.compile("Copied\\s"))
    assert page.evaluate("navigator.clipboard.readText()").startswith("def factorial(n)")


def test_nothing_is_wider_than_a_phone(stub: Stub, visit: Callable[..., Page]) -> None:
    page = visit(**PHONE)
    stub.answers = [streamed(MARKDOWN + "\n" + "long" * 100), refused(503, TORCHSERVE_BUSY)]
    send(page, "word" * 100)
    completed(page)
    send(page, "more")
    completed(page)
    widths = "[document.documentElement.scrollWidth, ...['scroller', 'main'].map((id) => byId(id).scrollWidth)]"
    assert max(page.evaluate(widths)) <= 360
    button(page, "Settings").click()
    assert page.evaluate("byId('settings').scrollWidth") <= 360
    page.keyboard.press("Escape")
    button(page, "Open the list of chats").click()
    expect(button(page, "New chat")).to_be_focused()
    page.keyboard.press("Escape")
    expect(button(page, "Open the list of chats")).to_be_focused()
    expect(button(page, "New chat")).to_be_hidden()
    for one in page.get_by_role("button").all():
        size = one.bounding_box()
        assert size is None or min(size["width"], size["height"]) >= 24, "WCAG 2.2, 2.5.8: targets of 24 pixels"


def tab_to(page: Page, name: str, *, back: bool = False) -> None:
    for _ in range(40):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if (
            page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText")
            == name
        ):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is visible"
            return
    pytest.fail(f"{name} is not reached by Tab")


def test_everything_is_reached_by_keyboard(stub: Stub, page: Page) -> None:
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "Skip to the message box")
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    completed(page)
    assert stub.dialog == [("user", "one\ntwo")]
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("textbox", name="Edit message")).to_have_value("one\ntwo")
    page.keyboard.press("Escape")
    expect(button(page, "Edit message")).to_be_focused()
    tab_to(page, "Regenerate answer")
    page.keyboard.press("Enter")
    completed(page)
    tab_to(page, "Settings", back=True)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(button(page, "Settings")).to_be_focused()
    tab_to(page, "Delete chat: one two", back=True)
    page.keyboard.press("Enter")
    expect(page.get_by_role("article")).to_have_count(0)


def test_a_composition_of_characters_is_not_sent_by_its_enter(stub: Stub, page: Page) -> None:
    box(page).fill("にほん")
    box(page).evaluate("(area) => area.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))")
    assert stub.requests == []


def test_screen_readers_hear_the_beginning_and_the_end_and_not_every_token(stub: Stub, page: Page) -> None:
    page.evaluate(
        """() => {
          window.heard = [];
          const status = byId("status");
          new MutationObserver(() => window.heard.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    stub.answers = [streamed(*["word "] * 50)]
    send(page, "Talk")
    completed(page)
    assert page.evaluate("window.heard") == ["Generating an answer", "Answer complete: " + "word " * 50]


def test_only_the_last_answer_is_rendered_and_at_most_once_per_frame(stub: Stub, page: Page) -> None:
    more, half = threading.Event(), [delta("a **word** ")] * 1000
    stub.answers = [streamed(MARKDOWN), Answer([*half, more, *half, delta("", "stop"), usage(2000)])]
    send(page, "First")
    completed(page)
    page.evaluate(
        """() => {
          window.renders = window.frames = 0;
          const original = rendered;
          rendered = (text) => { window.renders += 1; return original(text); };
          const count = () => { window.frameCount = (window.frameCount ?? 0) + 1; requestAnimationFrame(count); };
          requestAnimationFrame(count);
        }"""
    )
    send(page, "Second")
    expect(answer(page).locator("strong").first).to_be_visible()
    more.set()
    completed(page)
    renders, frames = page.evaluate("[window.renders, window.frameCount]")
    assert 2 <= renders <= frames + 3, "and once per message when they are put in place"
    expect(answer(page).locator("strong")).to_have_count(2000)


def test_the_beginning_of_an_answer_stays_selected_while_it_grows(stub: Stub, page: Page) -> None:
    more = threading.Event()
    stub.answers = [Answer([delta("Selected words.\n\nMore"), more, delta(" text"), delta("", "stop"), usage(2)])]
    send(page, "Talk")
    expect(answer(page).locator("p")).to_have_count(2)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.prose p'))")
    more.set()
    completed(page)
    assert page.evaluate("getSelection().toString()") == "Selected words."


def test_the_reader_may_scroll_back_while_an_answer_grows(stub: Stub, page: Page) -> None:
    more = threading.Event()
    stub.answers = [Answer([delta("line\n\n" * 60), more, delta("line\n\n" * 60), delta("", "stop"), usage(2)])]
    send(page, "Talk")
    expect(answer(page).locator("p")).to_have_count(60)
    gap = "byId('scroller').scrollHeight - byId('scroller').clientHeight - byId('scroller').scrollTop"
    assert page.evaluate(gap) < 2, "the end is in sight"
    page.evaluate("byId('scroller').scrollTop = 100")
    expect(button(page, "Scroll to the end")).to_be_visible()
    more.set()
    completed(page)
    assert page.evaluate("byId('scroller').scrollTop") == 100
    button(page, "Scroll to the end").click()
    assert page.evaluate(gap) < 2


def test_a_chat_goes_on_while_another_is_read(stub: Stub, page: Page) -> None:
    more = threading.Event()
    stub.answers = [Answer([delta("Slow"), more, delta(" answer"), delta("", "stop"), usage(2)])]
    send(page, "Slow chat")
    expect(answer(page).locator(".prose")).to_have_text("Slow")
    button(page, "New chat").click()
    send(page, "Fast chat")
    expect(completed(page).locator(".prose")).to_have_text("Fine.")
    more.set()
    page.get_by_role("navigation").get_by_role("button", name=re.compile("^Slow chat")).click()
    expect(completed(page).locator(".prose")).to_have_text("Slow answer")


@pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(stub: Stub, visit: Callable[..., Page], scheme: str, phone: bool) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(color_scheme=scheme, reduced_motion="reduce", **(PHONE if phone else {}))
    found: dict[str, list[str]] = {}

    def check(state: str) -> None:
        violations = axe.run(page).response["violations"]
        serious = [one for one in violations if one["impact"] in ("serious", "critical")]
        found[state] = [f"{one['id']}: {node['html'][:200]}" for one in serious for node in one["nodes"]]

    check("empty")
    stub.answers = [streamed(MARKDOWN), streamed("Again"), refused(503, TORCHSERVE_BUSY)]
    send(page, "Show me")
    completed(page)
    button(page, "Regenerate answer").click()
    completed(page)
    button(page, "Previous version").click()
    send(page, "more")
    completed(page)
    check("conversation")
    box(page).press("ArrowUp")
    check("editing")
    page.keyboard.press("Escape")
    button(page, "Settings").click()
    page.get_by_label("Temperature").fill("3")
    check("settings")
    button(page, "Token").click()
    check("token")
    page.keyboard.press("Escape")
    if phone:
        button(page, "Open the list of chats").click()
        check("list")
    assert {state: violations for state, violations in found.items() if violations} == {}
