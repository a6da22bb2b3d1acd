"""The page at `/`: what it is made of, and what it does in a browser."""

import base64
import hashlib
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pallas_paged.engine import AsyncLLM
from pallas_paged.engine.serve.page import content_security_policy, page_answer
from pallas_paged.engine.serve.parsers.formats import HERMES
from pallas_paged.models.demo import DEMO_MODEL
from tests.browser import Browser, open_browser
from tests.engine.serve.live import SMALL, Live, live_server

MAX_BYTES = 32_000
PAGE = bytes(page_answer().body).decode()
IS_IDLE = "return !document.querySelector('#send').disabled"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HTML = "<b>bold</b><script>document.title = 1</script>"


# --- what it is made of ---------------------------------------------------------------------------


def test_it_is_served_with_its_policy(live: Live) -> None:
    with urllib.request.urlopen(live.url) as answer:
        assert answer.read().decode() == PAGE
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
    parts = dict(part.split(" ", 1) for part in policy.split("; "))
    for element in ("script", "style"):
        (body,) = re.findall(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert parts[f"{element}-src"] == f"'sha256-{digest}'"
    assert parts["default-src"] == parts["frame-ancestors"] == "'none'"
    assert parts["connect-src"] == "'self'"


def test_a_policy_is_of_every_script() -> None:
    policy = content_security_policy("<script>a</script><p></p><script>\nb</script>")
    hashes = re.findall(r"sha256-([^']+)", policy)
    wanted = [hashlib.sha256(body).digest() for body in (b"a", b"\nb")]
    assert [base64.b64decode(each) for each in hashes] == wanted


def test_it_needs_nothing_from_elsewhere() -> None:
    assert len(PAGE.encode()) < MAX_BYTES
    assert re.findall(r"https?:|//[\w.]|@import|url\(|<(?:img|iframe|object)|\ssrc=", PAGE) == []
    assert re.findall(r'\shref="([^"]*)"', PAGE) == ["data:,"]


def test_it_makes_no_html_of_what_comes() -> None:
    assert re.findall(r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write|eval\(", PAGE) == []
    assert re.findall(r"\s(?:on\w+|style)=", PAGE.partition("<script>")[0]) == []


def test_what_its_parts_call_each_other_is_there() -> None:
    html, _, script = PAGE.partition("<script>")
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:byId|copyOf)\("([^"]+)"\)', script)
    used += re.findall(r'\s(?:for|aria-controls|aria-labelledby)="([^"]+)"', html)
    assert len(used) > 20
    assert set(used) <= set(ids)
    assert set(re.findall(r'form\.get\("([^"]+)"\)', script)) < set(
        re.findall(r'\sname="([^"]+)"', html)
    )
    classes = set(" ".join(re.findall(r'class="([^"]+)"', html)).split())
    selectors = " ".join(re.findall(r'(?:querySelector|find)\("([^"]+)"\)', script))
    assert set(re.findall(r"\.([\w-]+)", selectors)) <= classes


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(window: Browser, live: Live) -> Iterator[Browser]:
    """The page of the demo model."""
    yield opened(window, live)
    assert window.complaints() == []


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    """A server that asks for a key, has a chat template, and tells reasoning and calls apart."""
    with live_server(
        api_keys=("k",),
        chat_template=TEMPLATE,
        has_reasoning=True,
        tool_format=HERMES,
        metrics_prefix="other",
    ) as running:
        yield running
        running.assert_idle()


@pytest.fixture
def chat(window: Browser, guarded: Live) -> Iterator[Browser]:
    """The page of that server, with the key given and the tab of chats shown."""
    page = opened(window, guarded)
    give_key(page, "k")
    page.click("#chat-tab")
    yield page
    assert window.complaints() == []


def opened(window: Browser, server: Live) -> Browser:
    """Opens a server's page with nothing stored, and keeps the requests that it sends."""
    window.go(server.url)
    window.run("sessionStorage.clear()")
    window.go(server.url)
    window.run(
        "window.sent = []; const real = fetch;"
        "window.fetch = (path, options) => { sent.push([path, options.body]);"
        " return real(path, options) }"
    )
    window.wait(
        "return document.querySelector('#model').value || !!document.querySelector("
        "'#key-form:not([hidden])')"
    )
    return window


def give_key(page: Browser, key: str) -> None:
    page.write("#key", key)
    page.press("Enter")


def ask(page: Browser, text: str | None = None, more: Any = None, **fields: Any) -> None:
    """Fills in the parameters, sends, and waits for the answer's end."""
    fill(page, text, more, **fields)
    page.click("#send")
    page.wait(IS_IDLE)


def fill(page: Browser, text: str | None = None, more: Any = None, **fields: Any) -> None:
    fields |= {} if more is None else {"more": json.dumps(more)}
    for name, value in fields.items():
        page.write(f"[name={name}]", str(value))
    if text is not None:
        page.write("#prompt", text)


def bodies(page: Browser) -> list[Any]:
    """Returns what was sent for answers."""
    return [json.loads(body) for _, body in page.run("return sent") if body]


def test_a_completion_comes_in_pieces_with_its_figures(page: Browser, live: Live) -> None:
    page.run(
        "window.lengths = new Set(); new MutationObserver(() => lengths.add("
        "document.querySelector('.text')?.textContent.length)).observe("
        "document.body, {subtree: true, childList: true, characterData: true})"
    )
    options = {"temperature": 0, "max_tokens": 24, "seed": 1, "top_p": 0.5}
    ask(page, "def main(", stop="zzz\n\\nq\\n", **options)
    (body,) = bodies(page)
    assert options.items() <= body.items()
    assert body["stop"] == ["zzz", "\nq\n"]
    data = json.dumps({"prompt": "def main("} | options).encode()
    with urllib.request.urlopen(f"{live.url}/v1/completions", data) as answer:
        wanted = json.load(answer)["choices"][0]["text"]
    assert page.run("return document.querySelector('.text').textContent") == wanted
    assert len(page.run("return [...lengths]")) > 3
    figures = r"\d+ prompt tokens · 24 tokens · [\d.]+ tokens/s · first after \d+ ms · length"
    assert re.fullmatch(figures, page.text(".figures"))
    ask(page, max_tokens=5, temperature=1, more={"n": 2})
    assert page.run("return document.querySelectorAll('.turn:last-child .text').length") == 2
    page.click("#clear")
    assert page.run("return document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize(
    "action",
    [
        "document.querySelector('#stop').click()",
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))",
    ],
)
def test_a_stopped_request_ends_in_the_server(page: Browser, live: Live, action: str) -> None:
    assert page.run("return document.querySelector('#stop').disabled")
    page.run(
        "new MutationObserver((_, observer) => { if (document.querySelector('.text')) "
        f"{{ observer.disconnect(); {action} }} }}).observe("
        "document.body, {subtree: true, childList: true})"
    )
    ask(page, "def f(x):", {"ignore_eos": True, "n": 4}, max_tokens=490)
    assert page.text(".figures").endswith("stopped")
    assert page.text(".error") == ""
    live.assert_idle()
    assert int(re.findall(r"(\d+) tokens", page.text(".figures"))[0]) < 4 * 490


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("temperature", "-1", "temperature=-1.0 must be a finite number >= 0"),
        ("temperature", "warm", "temperature='warm': input should be a valid number"),
        ("seed", "12345678901234567890", "seed='12345678901234567890': input should be"),
        ("max_tokens", "1.5", "max_tokens=1.5: input should be a valid integer"),
        ("more", '{"tempo": 3}', "tempo=3 is not supported; leave it out"),
        ("more", "{tempo", "JSON"),
    ],
)
def test_an_error_has_the_servers_words(page: Browser, name: str, value: str, reason: str) -> None:
    page.write(f"[name={name}]", value)
    ask(page)
    assert reason in page.text(".error")
    assert page.text(".text") == ""
    page.write(f"[name={name}]", "1" if name != "more" else "{}")
    ask(page)
    assert page.text(".turn:last-child .text")


def test_a_model_without_chat_template_says_so(window: Browser, tmp_path: Path) -> None:
    for file in Path(DEMO_MODEL).iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with live_server(AsyncLLM(tmp_path, **SMALL)) as bare:
        page = opened(window, bare)
        page.click("#chat-tab")
        ask(page, "hello")
        assert "has no chat template" in page.text(".error")
        assert page.run("return document.querySelector('#prompt').value") == "hello"
        page.click("#completion-tab")
        ask(page, max_tokens=4)
        assert " 4 tokens" in page.text("#completion-log .figures")
        page.click("#chat-tab")
        assert page.run("return document.querySelector('#prompt').value") == "hello"
        assert page.complaints() == []


def test_what_a_model_writes_is_no_html(page: Browser) -> None:
    ask(page, "<i>x</i>", {"structured_outputs": {"choice": [HTML * 4]}}, max_tokens=400)
    assert page.text(".text") == HTML * 4
    assert page.text(".asked") == "<i>x</i>"
    assert page.run("return document.querySelectorAll('b, i, #completion-log script').length") == 0
    assert page.run("return document.title") == "pallas-paged"


def test_the_policy_refuses_a_script_that_gets_in(page: Browser) -> None:
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.got = 1';"
        "document.body.append(script)"
    )
    assert page.run("return window.got ?? null") is None
    assert "Content Security Policy" in " ".join(page.complaints())


def test_the_keyboard_is_enough(page: Browser) -> None:
    fill(page, "a = ", max_tokens=3)
    page.press("Control", "Enter")
    page.wait("return document.querySelector('.figures')?.textContent.endsWith('length')")
    page.run("document.querySelector('#completion-tab').focus()")
    page.press("ArrowRight")
    assert page.run("return document.activeElement.id") == "chat-tab"
    assert page.run("return document.querySelector('#chat-panel').checkVisibility()")
    assert not page.run("return document.querySelector('#completion-panel').checkVisibility()")


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_window(page: Browser, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.command("Emulation.setDeviceMetricsOverride", **size)
    try:
        ask(page, "x" * 150, {"structured_outputs": {"choice": ["y" * 200]}}, max_tokens=300)
        assert page.text(".text") == "y" * 200
        assert page.run("return document.documentElement.scrollWidth") <= width
        log = "const log = document.querySelector('.log');"
        assert page.run(log + "return log.scrollWidth - log.clientWidth") == 0
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")


def meter(label: str) -> str:
    return (
        "const found = [...document.querySelectorAll('.meter')].find("
        f"(each) => each.querySelector('dt').textContent === '{label}');"
        "const value = parseFloat(found.querySelector('dd').textContent);"
    )


SPLIT = """
const [text, size] = arguments, bytes = new TextEncoder().encode(text), found = [];
const pieces = piecesOf(new Response(new ReadableStream({start(to) {
  for (let i = 0; i < bytes.length; i += size) to.enqueue(bytes.slice(i, i + size));
  to.close();
}})));
return (async () => {
  try { for await (const piece of pieces) found.push(piece.a); }
  catch (error) { found.push(error.message); }
  return found;
})();
"""
"""Reads events from bytes that come in parts of one size."""


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("end", "last"),
    [
        ("data: [DONE]\n\n", []),
        ('data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n', ["no"]),
        ("", ["the stream ended before the answer did"]),
        ('data: {"a": "c"}', ["the stream ended before the answer did"]),
    ],
)
def test_events_are_read_wherever_they_are_cut(
    page: Browser, end: str, last: list[str], size: int
) -> None:
    text = 'data: {"a": "é😀"}\n\ndata: {"a": "data: "}\n\n' + end
    assert page.run(SPLIT, text, size) == ["é😀", "data: ", *last]


def test_the_server_is_watched(page: Browser, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    device = live.llm.engine.parts.core.executor
    dispatch = device.dispatch

    def dispatch_slowly(plan: Any) -> Any:
        time.sleep(0.02)  # so that a request lasts for several of the page's looks
        return dispatch(plan)

    monkeypatch.setattr(device, "dispatch", dispatch_slowly)
    page.wait("return document.querySelector('#watching').textContent === 'live'")
    page.wait(meter("Running requests") + "return value === 0")
    fill(page, "import os\n" * 20, {"ignore_eos": True, "n": 4}, max_tokens=150)
    page.click("#send")
    for label in ("KV pool in use", "Generated tokens/s", "Prompt tokens/s"):
        page.wait(meter(label) + "return found.querySelector('.line').getAttribute('d')")
    tops = (
        "return samples.some((now, i) => i && METERS[3].value(now, samples[i - 1]) > 0)"
        " && samples.some((now) => now.kv_cache_usage_perc > 0)"
    )
    page.wait(tops)
    page.wait(IS_IDLE)
    ask(page)
    page.wait(meter("Prefix cache hits") + "return value > 0")
    page.wait(meter("Running requests") + "return value === 0")


def test_metrics_are_read_by_their_endings(page: Browser) -> None:
    text = """# HELP a:num_requests_running Requests.
a:num_requests_running{engine="0",model_name="a} 7 {:b"} 2.0
a:num_requests_running{engine="1",model_name="a"} 3.0
a:x:generation_tokens_total 1.5e+03
process_open_fds 9.0
"""
    values = page.run("return metricsIn(arguments[0])", text)
    del values["time"]
    assert values == {
        "num_requests_running": 5,
        "generation_tokens_total": 1500,
        "process_open_fds": 9,
    }


def test_nobody_asks_for_a_page_that_is_not_seen(page: Browser) -> None:
    count = "return sent.filter(([path]) => path === 'metrics').length"
    page.wait(f"return (() => {{ {count} }})() > 0")
    page.run("Object.defineProperty(document, 'visibilityState', {value: 'hidden'})")
    before = page.run(count)
    page.wait("window.until ??= performance.now() + 2500; return performance.now() > until")
    assert page.run(count) <= before + 1


def test_a_server_that_ends_is_seen(window: Browser) -> None:
    with live_server() as running:
        page = opened(window, running)
        page.wait("return document.querySelector('#watching').textContent === 'live'")
    page.wait("return document.querySelector('#watching').textContent !== 'live'")
    ask(page, "a")
    assert page.text(".error")
    window.complaints()


def test_a_conversation_is_sent_as_it_was(chat: Browser) -> None:
    ask(
        chat,
        "one",
        {"structured_outputs": {"choice": ["<think>so</think>first"]}},
        system="be brief",
    )
    assert chat.text(".reasoning div") == "so"
    assert chat.text(".text") == "first"
    chat.click(".reasoning summary")
    assert chat.text(".reasoning div") == ""
    ask(chat, "two", {"structured_outputs": {"choice": ["second"]}})
    assert chat.text(".turn:last-child .text") == "second"
    assert chat.text(".turn:last-child .reasoning") == ""
    assert bodies(chat)[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
    ]
    chat.click("#clear")
    ask(chat, "three")
    assert [message["role"] for message in bodies(chat)[2]["messages"]] == ["system", "user"]


def test_calls_of_tools_are_shown_and_sent_back(chat: Browser) -> None:
    schema = {"type": "object", "properties": {"city": {"const": "Oslo"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "<b>f", "parameters": schema}}
    ask(
        chat,
        "weather?",
        {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False},
        max_tokens=300,
    )
    call = chat.text(".call")
    assert call.splitlines()[0] == "Calls <b>f"
    assert "tool_calls" in chat.text(".figures")
    ask(chat, "and?", {})
    sent = bodies(chat)[1]["messages"][1]
    assert sent["role"] == "assistant"
    (back,) = sent["tool_calls"]
    assert back["function"]["name"] == "<b>f"
    assert json.loads(back["function"]["arguments"]) == {"city": "Oslo"}
    assert back["id"]


def test_a_key_is_asked_for_and_kept_in_the_session(window: Browser, guarded: Live) -> None:
    page = opened(window, guarded)
    words = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
    assert page.text("#notice") == words
    ask(page, "a = ")
    assert page.text(".error") == words
    give_key(page, "wrong")
    page.wait("return sent.filter(([path]) => path === 'v1/models').length === 1")
    assert page.text("#notice") == words
    give_key(page, "k")
    page.wait("return document.querySelector('#model').value === 'demo'")
    assert page.text("#notice") == ""
    ask(page, max_tokens=3)
    assert "3 tokens" in page.text(".turn:last-child .figures")
    page.go(guarded.url)
    page.wait("return document.querySelector('#model').value === 'demo'")
    assert page.text("#key-form") == ""
    assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
    assert window.complaints() == []
