"""The page at `/`: one self-contained file and the content-security policy that lets exactly its own code run."""

import base64
import hashlib
from html.parser import HTMLParser
from importlib import resources


class PageError(ValueError):
    """The page cannot be served under a strict policy."""


class _InlineCode(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.problems: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.blocks:
            self._open = tag
            self.blocks[tag].append("")
        for name, _ in attrs:
            if name.startswith("on") or name == "style" or (tag == "script" and name == "src"):
                self.problems.append(f"<{tag} {name}=...>")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.blocks[self._open][-1] += data


def read_page() -> bytes:
    """Return the page as it lies in the package."""
    return resources.files("domino_jax.serving.http").joinpath("page", "index.html").read_bytes()


def make_policy(page: bytes) -> str:
    """Return the `Content-Security-Policy` of a page: its inline scripts and styles by hash, its own server, no more.

    Raises:
        PageError: the page has inline event handlers, style attributes or outside scripts, which hashes do not cover.
    """
    parser = _InlineCode()
    # A browser hashes the text after it has made every line break a line feed.
    parser.feed(page.decode("utf-8").replace("\r\n", "\n"))
    parser.close()
    if parser.problems:
        raise PageError(f"the page has {', '.join(parser.problems[:5])}; move this into its script or style element")
    sources = {tag: " ".join(_hash(block) for block in blocks) or "'none'" for tag, blocks in parser.blocks.items()}
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
