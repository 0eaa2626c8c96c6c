"""The playground page: what its file may hold, and how it behaves in a real Chromium."""

import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.serving.http.page_server import BLOCK, Behaviour, PageServer

PAGE = Path(__file__).resolve().parents[3] / "domino_jax" / "serving" / "http" / "page" / "index.html"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_MISSING = [
    *([] if find_spec("playwright") else ["the package playwright (pip install playwright)"]),
    *([] if CHROMIUM else ["a chromium (apt-get install chromium, or its path in CHROMIUM)"]),
]
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"the page is tried in a browser; missing: {' and '.join(_MISSING)}"),
]
HOSTILE = '<img src=x onerror="window.hacked=1">&lt;b&gt;</script><script>window.hacked=1</script>'


class _Inventory(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def html() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    inventory = _Inventory()
    inventory.feed(html)
    return inventory.elements


def test_nothing_needs_an_unsafe_policy(elements):
    names = {name for _, attributes in elements for name in attributes}
    assert "style" not in names
    assert not [name for name in names if name.startswith("on")]


def test_nothing_is_loaded_from_elsewhere(html, elements):
    loaders = {"src", "srcset", "href", "action", "formaction", "data", "poster", "background"}
    targets = [attributes[name] for _, attributes in elements for name in loaders & set(attributes)]
    assert all(target.startswith(("#", "data:image/svg+xml,")) for target in targets)
    assert not {"iframe", "object", "embed", "base", "img"} & {tag for tag, _ in elements}
    # A namespace is a name, not an address.
    assert set(re.findall(r"(?:https?:)?//[a-z][^\s\"'`]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html
    assert "url(" not in html


def test_text_enters_the_page_as_text(html):
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
    assert not re.findall(ways + r"|setHTML|\beval\(|new Function|javascript:|set(Timeout|Interval)\(\s*[\"'`]", html)
    assert "textContent" in html


def test_one_script_and_one_style_so_that_a_policy_can_name_them(html, elements):
    # Hashes are of the text between the tags; an attribute or a third block would be left out.
    assert [attributes for tag, attributes in elements if tag in ("script", "style")] == [{}, {}]
    assert html.count("<script>") == html.count("<style>") == 1
    assert len(html.encode()) < 80_000


def test_every_field_has_a_name(elements):
    labelled = {attributes.get("for") for tag, attributes in elements if tag == "label"}
    fields = [attributes for tag, attributes in elements if tag in ("input", "textarea")]
    # A checkbox stands inside its label.
    unnamed = [a["id"] for a in fields if a.get("type") != "checkbox" and a["id"] not in labelled]
    assert fields
    assert not unnamed


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "papers", "least"),
    [
        ("ink", ["paper", "raised", "sunken", "drafted-paper", "corrected-paper", "bonus-paper", "alarm-paper"], 7.0),
        ("soft", ["paper", "raised", "sunken", "alarm-paper"], 4.5),
        ("accent", ["paper", "raised"], 4.5),
        ("alarm", ["alarm-paper"], 4.5),
        ("on-accent", ["accent"], 4.5),
        ("edge", ["paper", "raised"], 3.0),
        ("drafted", ["drafted-paper", "raised"], 3.0),
        ("corrected", ["corrected-paper"], 3.0),
        ("bonus", ["bonus-paper"], 3.0),
    ],
)
def test_contrast(html, theme, ink, papers, least):
    """WCAG 2.2: 4.5 for text (7 for the answers), 3 for marks and borders of fields."""
    colours = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", html)}
    for paper in papers:
        low, high = sorted(_luminance(colours[name][theme]) for name in (ink, paper))
        assert (high + 0.05) / (low + 0.05) >= least, (ink, paper)


# ---- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server(html: str) -> Iterator[PageServer]:
    with PageServer(html) as server:
        yield server


@pytest.fixture
def open_page(browser: Any, server: PageServer) -> Iterator[Any]:
    contexts = []
    faults: list[str] = []

    def open_page(wait_for: str = "ready", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None,
        )
        page.goto(server.url)
        page.wait_for_selector(f"#server[data-state={wait_for}]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def _send(page: Any, prompt: str, key: str = "Enter", waits: bool = True) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", key)
    if waits:
        page.wait_for_selector("#send:not([hidden])")


def _wait_for_disconnect(page: Any, server: PageServer) -> None:
    for _ in range(50):
        if server.num_disconnects:
            break
        page.wait_for_timeout(50)
    assert server.num_disconnects == 1


def _marks(page: Any) -> list[list[str]]:
    script = "nodes => nodes.map(node => [node.textContent, node.className.replace('token ', '')])"
    return page.eval_on_selector_all("#conversation .text .token", script)


class TestInBrowser:
    pytestmark = in_browser

    def test_streams_an_answer_with_its_marks_and_figures(self, open_page, server):
        page = open_page()
        _send(page, "Hello")
        tokens = server.behaviour.tokens
        marks = _marks(page)
        assert [text for text, _ in marks] == tokens
        assert [source for _, source in marks[:11]] == (
            ["target", *["drafted"] * 2, "corrected", *["drafted"] * 4, "bonus", "corrected", "drafted"]
        )
        assert page.text_content(".meters div:nth-child(2) dd") == "3.22"
        assert page.text_content(".meters div:nth-child(4) dd") == str(len(tokens))
        assert page.get_attribute(".histogram", "aria-label") == (
            "Acceptance lengths: 2 rounds of 1, 3 rounds of 3, 2 rounds of 4, 2 rounds of 5"
        )
        (body,) = server.requests
        assert body["messages"] == [{"role": "user", "content": "Hello"}]
        assert body["model"] == "tiny-target"
        assert body["use_draft"] is body["return_metrics"] is body["return_token_sources"] is body["stream"] is True

    @pytest.mark.parametrize("length", [1, 4, 9, 12, 23])
    def test_counts_by_itself_as_the_server_does(self, open_page, server, length):
        figures = []
        for metrics_in in ("usage", "last", "none"):
            # Lengths at which a round ends: one that the token limit cuts is known to the server alone.
            tokens = [f" {i}" for i in range(length)]
            server.behaviour = Behaviour(tokens=tokens, accepted=(2, BLOCK, 1, 0), metrics_in=metrics_in)
            page = open_page()
            _send(page, "Count")
            meters = [page.text_content(f".meters div:nth-child({n}) dd") for n in (2, 4)]
            figures.append([*meters, page.get_attribute(".histogram", "aria-label")])
        assert figures[0] == figures[1] == figures[2]

    def test_settings_reach_the_request(self, open_page, server):
        page = open_page()
        page.fill("#system", "Be brief.")
        for field, value in {
            "temperature": "0.7",
            "top_p": "0.9",
            "top_k": "40",
            "seed": "7",
            "max_tokens": "9",
        }.items():
            page.fill(f"#{field}", value)
        page.check("#thinking")
        page.uncheck("#use_draft")
        page.fill("#key", "secret")
        server.behaviour.api_key = "secret"
        _send(page, "Hello")
        _send(page, "And now?")
        body = server.requests[1]
        given = {name: body[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "use_draft")}
        assert given == {
            "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 9, "use_draft": False,
        }  # fmt: skip
        assert body["chat_template_kwargs"] == {"enable_thinking": True}
        answer = "".join(server.behaviour.tokens)
        assert [(m["role"], m["content"]) for m in body["messages"]] == [
            ("system", "Be brief."), ("user", "Hello"), ("assistant", answer), ("user", "And now?"),
        ]  # fmt: skip
        page.fill("#max_tokens", "")
        _send(page, "Again")
        assert "max_tokens" not in server.requests[2]

    def test_a_wrong_setting_is_named_and_nothing_is_sent(self, open_page, server):
        page = open_page()
        page.fill("#top_p", "3")
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Enter")
        assert "Top p" in page.text_content("#announce")
        assert page.evaluate("document.activeElement.id") == "top_p"
        assert page.input_value("#prompt") == "Hello"
        assert server.requests == []

    def test_markup_in_texts_and_names_stays_text(self, open_page, server):
        server.behaviour.model = f"{HOSTILE}-model"
        server.behaviour.tokens = ["Hi ", HOSTILE, " </div>", HOSTILE]
        page = open_page()
        _send(page, HOSTILE)
        assert "".join(text for text, _ in _marks(page)) == f"Hi {HOSTILE} </div>{HOSTILE}"
        assert page.text_content(".asked") == HOSTILE
        assert page.text_content("#server-model").startswith(f"{HOSTILE}-model")
        server.behaviour.refusal = (400, {"message": HOSTILE, "type": HOSTILE, "param": HOSTILE, "code": None}, {})
        _send(page, "Refuse")
        assert HOSTILE in page.text_content(".trouble")
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 1
        assert page.evaluate("window.hacked") is None

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_text_arrives_whole_whatever_its_pieces(self, open_page, server, newline):
        server.behaviour.newline = newline
        server.behaviour.splits_events = True
        server.behaviour.tokens = ["naïve ", "\U0001f9e9", "日本語", "\n\n", "  e\u0301", "data: x\n: y"]
        page = open_page()
        _send(page, "Characters")
        assert "".join(text for text, _ in _marks(page)) == "".join(server.behaviour.tokens)

    def test_thoughts_are_set_apart(self, open_page, server):
        server.behaviour.tokens = ["<think>", "\n", "Hm", ".", "\n", "</think>", "\n\n", "Yes", "."]
        page = open_page()
        _send(page, "Think")
        assert page.text_content(".thinking > div").strip() == "Hm."
        assert page.eval_on_selector_all(".text > .token", "n => n.map(x => x.textContent).join('')") == "Yes."

    def test_race_compares_speed_and_text(self, open_page, server):
        server.behaviour.round_s = 0.02
        page = open_page()
        _send(page, "Race", "Control+Enter", waits=False)
        page.wait_for_selector(".lane.running")
        assert "One run after the other" in page.text_content(".race-note")
        page.wait_for_selector(".verdict")
        assert [body["use_draft"] for body in server.requests] == [True, False]
        assert server.requests[0] == server.requests[1] | {"use_draft": True}
        # 30 tokens: one by the prefill, the others in 9 rounds or 29 steps of 0.05 s.
        assert page.text_content(".ratio") == "3.22\N{MULTIPLICATION SIGN}"
        assert "64.4 against 20.0 tokens/s" in page.text_content(".verdict")
        assert "Both texts are identical" in page.text_content(".verdict")
        before = page.locator(".lanes").inner_text()
        page.click("text=Replay side by side")
        page.wait_for_selector(".lane.running + .lane.running")
        page.wait_for_selector("#announce:text-is('Replay ended.')", state="attached")
        assert page.locator(".lanes").inner_text() == before
        _send(page, "Go on")
        assert [m["role"] for m in server.requests[2]["messages"]] == ["user", "assistant", "user"]

    def test_race_tells_where_texts_part(self, open_page, server):
        server.behaviour.plain_tokens = [*server.behaviour.tokens[:2], " violet", " cow"]
        page = open_page()
        page.fill("#temperature", "1")
        _send(page, "Race", "Control+Enter")
        assert "differ from character 11 on" in page.text_content(".verdict")
        first, second = server.requests
        assert first["seed"] == second["seed"]

    @pytest.mark.parametrize("mode", ["Enter", "Control+Enter"])
    @pytest.mark.parametrize("means", ["Escape", "#stop"])
    def test_stops_and_the_server_notices(self, open_page, server, mode, means):
        server.behaviour.round_s = 0.1
        page = open_page()
        _send(page, "Long", mode, waits=False)
        page.wait_for_selector(".text .token")
        if means == "Escape":
            page.keyboard.press("Escape")
        else:
            page.click(means)
        page.wait_for_selector("#send:not([hidden])", timeout=1000)
        assert "Stopped." in page.text_content("#conversation article:last-child")
        _wait_for_disconnect(page, server)
        assert len(server.requests) == 1
        assert page.evaluate("document.activeElement.id") == "prompt"

    @pytest.mark.parametrize(
        ("change", "title", "detail"),
        [
            ({"fault_after": 5}, "The answer broke off.", "logits are not finite"),
            ({"cut_after": 5}, "The answer broke off.", "ended before the answer did"),
            (
                {"refusal": (429, {"message": "8 requests wait"}, {"Retry-After": "3"})},
                "The server is busy.",
                "wait 3 s",
            ),
            ({"refusal": (400, {"message": "top_p is 7"}, {})}, "The server did not accept the request.", "top_p is 7"),
            ({"refusal": (500, {}, {})}, "The server could not answer.", "It gave no reason."),
            ({"tokens": [""]}, "The answer is empty.", "before any text"),
        ],
    )
    def test_faults_are_readable_and_can_be_tried_again(self, open_page, server, change, title, detail):
        page = open_page()
        _send(page, "First")
        for name, value in change.items():
            setattr(server.behaviour, name, value)
        _send(page, "Second")
        assert page.text_content(".trouble strong") == title
        assert detail in page.text_content(".trouble")
        assert title in page.text_content("#announce")
        server.behaviour = Behaviour()
        page.click("text=Try again")
        page.wait_for_selector(".trouble", state="detached")
        page.wait_for_selector("#send:not([hidden])")
        assert [m["role"] for m in server.requests[-1]["messages"]] == ["user", "assistant", "user"]
        assert page.locator(".asked").all_text_contents() == ["First", "Second"]

    def test_a_failed_turn_is_left_out_of_the_next_request(self, open_page, server):
        page = open_page()
        server.behaviour.fault_after = 5
        _send(page, "Breaks")
        server.behaviour.fault_after = None
        _send(page, "Works")
        assert [m["content"] for m in server.requests[-1]["messages"]] == ["Works"]
        assert page.locator(".retry").count() == 0

    def test_waits_for_a_server_that_loads(self, open_page, server):
        server.behaviour.loading = "the server is loading: compiled 3/12"
        page = open_page(wait_for="loading")
        page.wait_for_selector("#server-progress:not([hidden])")
        assert page.text_content("#server-text") == "loading: compiled 3/12"
        assert page.eval_on_selector("#server-progress", "bar => [bar.value, bar.max]") == [3, 12]
        page.fill("#prompt", "Too early")
        page.press("#prompt", "Enter")
        assert page.input_value("#prompt") == "Too early"
        assert "Not sent" in page.text_content("#announce")
        server.behaviour.loading = None
        page.wait_for_selector("#server[data-state=ready]")
        assert page.text_content("#server-model") == "tiny-target · 2,048 tokens of context"
        _send(page, "Now")
        assert len(server.requests) == 1

    @pytest.mark.parametrize("message", ["the server is shutting down", "the engine has failed"])
    def test_tells_loading_from_ending(self, open_page, server, message):
        server.behaviour.loading = message
        page = open_page(wait_for="down")
        assert page.text_content("#server-text") in message
        assert page.get_attribute("#send", "aria-disabled") == "true"

    def test_asks_for_a_key_and_keeps_it_for_the_tab_alone(self, open_page, server):
        server.behaviour.api_key = "secret"
        page = open_page(wait_for="key")
        _send(page, "Hello")
        assert "missing or wrong API key" in page.text_content(".trouble")
        page.click("text=Enter the key")
        page.keyboard.type("secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#server[data-state=ready]")
        page.click("text=Try again")
        page.wait_for_selector(".text .token")
        stored = page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        assert "secret" not in stored
        assert page.evaluate("JSON.stringify(sessionStorage)").count("secret") == 1

    def test_finds_the_model_anew_after_a_restart_with_another(self, open_page, server):
        page = open_page()
        server.behaviour.model = "other-target"
        _send(page, "Hello")
        assert page.text_content(".trouble strong") == "The server does not know this."
        page.wait_for_selector("#server-model:has-text('other-target')")
        page.click("text=Try again")
        page.wait_for_selector(".text .token")
        assert server.requests[-1]["model"] == "other-target"

    def test_says_when_the_server_is_gone(self, open_page, server):
        page = open_page()
        server.shutdown()
        server.socket.close()
        _send(page, "Anybody?")
        assert page.text_content(".trouble strong") == "The server cannot be reached."
        page.wait_for_selector("#server[data-state=down]")

    def test_works_from_the_keyboard_alone(self, open_page, server):
        page = open_page()
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.wait_for_selector(".meters")
        page.wait_for_selector("#send:not([hidden])")
        assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
        # Every control can be reached, in the order of the page, and shows where the focus is.
        page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges()")
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            shown = page.evaluate(
                "() => { const node = document.activeElement, style = getComputedStyle(node.id === 'prompt' ? "
                "node.closest('.box') : node); return [node.id, style.outlineStyle !== 'none'] }"
            )
            reached.append(shown)
        ids = [name for name, _ in reached]
        wanted = [
            "theme",
            "prompt",
            "clear",
            "race",
            "send",
            "system",
            "temperature",
            "seed",
            "thinking",
            "marks",
            "key",
        ]
        assert set(wanted) <= set(ids)
        assert all(is_visible for name, is_visible in reached if name)

    def test_announcements_do_not_follow_every_token(self, open_page, server):
        server.behaviour.round_s = 0.02
        page = open_page()
        page.evaluate(
            "window.said = []; new MutationObserver(() => said.push(document.getElementById('announce').textContent))"
            ".observe(document.getElementById('announce'), { childList: true, characterData: true, subtree: true })"
        )
        _send(page, "Hello")
        said = page.evaluate("said")
        assert said[0] == "Answering."
        assert said[-1].startswith("Answer finished: 30 tokens, 3.2 a round.")
        assert len(said) == 2
        live = page.eval_on_selector_all("[aria-live], [role=log], [role=status]", "nodes => nodes.map(n => n.id)")
        assert live == ["announce"]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_fits_a_phone(self, open_page, server, scheme):
        server.behaviour.tokens = ["x" * 300, " word", " " + "y" * 90] * 3
        server.behaviour.model = "a-very-long-organisation/" + "model-name-" * 8
        page = open_page(viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True)
        _send(page, "z" * 200)
        _send(page, "Race", "Control+Enter")
        server.behaviour.fault_after = 1
        _send(page, "Fault")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.click("#panel-toggle")
        assert page.evaluate("document.activeElement.id") == "system"
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for field in ("system", "key"):
            page.focus(f"#{field}")
            top, bottom = page.eval_on_selector(
                f"#{field}", "node => [node.getBoundingClientRect().top, node.getBoundingClientRect().bottom]"
            )
            header_bottom = page.eval_on_selector("header", "node => node.getBoundingClientRect().bottom")
            assert header_bottom <= top < bottom <= 640
        page.click("#panel-toggle")
        assert not page.is_visible("#system")
        page.click("#panel-toggle")
        page.keyboard.press("Escape")
        assert not page.is_visible("#system")
        assert page.evaluate("document.activeElement.id") == "panel-toggle"

    def test_themes(self, open_page):
        page = open_page(color_scheme="dark")
        colour = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(colour)
        seen = []
        for _ in range(3):
            page.click("#theme")
            seen.append((page.text_content("#theme"), page.evaluate(colour) == dark))
        assert seen == [("Theme: light", False), ("Theme: dark", True), ("Theme: auto", True)]
        page.click("#theme")
        page.reload()
        assert page.text_content("#theme") == "Theme: light"

    @pytest.mark.parametrize(("motion", "animation"), [("reduce", "none"), ("no-preference", "blink")])
    def test_keeps_still_where_motion_is_unwelcome(self, open_page, server, motion, animation):
        server.behaviour.round_s = 0.1
        page = open_page(reduced_motion=motion)
        _send(page, "Hello", waits=False)
        page.wait_for_selector(".streaming")
        shown = page.evaluate("getComputedStyle(document.querySelector('.streaming'), '::after').animationName")
        assert shown == animation

    def test_clear_forgets_the_conversation_even_in_mid_stream(self, open_page, server):
        server.behaviour.round_s = 0.1
        page = open_page()
        _send(page, "First", waits=False)
        page.wait_for_selector(".text .token")
        page.click("#clear")
        page.wait_for_selector("#send:not([hidden])", timeout=500)
        _wait_for_disconnect(page, server)
        assert page.is_visible("#welcome")
        server.behaviour.round_s = 0.0
        _send(page, "Second")
        assert [m["content"] for m in server.requests[-1]["messages"]] == ["Second"]
        assert page.locator("#conversation .asked").count() == 1
