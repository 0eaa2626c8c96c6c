"""A server for the tests of the playground page: answers from a script, so that every state of the page can be had."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

BLOCK = 4


def content_security_policy(page: str) -> str:
    """Return the strictest policy that lets the page's own script and style run."""
    sources = {}
    for tag in ("script", "style"):
        digests = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        ]
        sources[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@dataclass
class Behaviour:
    """What the server does; a test sets it between requests.

    Attributes:
        tokens: the answer, one text a token.
        plain_tokens: the answer of plain runs, where it is to be another one.
        accepted: accepted drafts of one round after the other, over and over.
        round_s: seconds a verify round or plain step takes.
        step_s: seconds the server says that it took, so that figures do not depend on the machine.
        fault_after: tokens after which an error is sent in mid-stream.
        cut_after: tokens after which the connection ends without a word.
        refusal: (status, error body, headers) instead of an answer.
        loading: message of `/ready` while it is 503.
        metrics_in: the chunk that carries the metrics.
        splits_events: each event goes out in two parts, in the middle of its first wide character where it has one.
    """

    tokens: list[str] = field(default_factory=lambda: re.findall(r"\s*\S+", "The quick brown fox jumps. " * 6))
    plain_tokens: list[str] | None = None
    accepted: tuple[int, ...] = (2, 4, 0, 3)
    round_s: float = 0.0
    step_s: float = 0.05
    fault_after: int | None = None
    cut_after: int | None = None
    refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None
    loading: str | None = None
    model: str = "tiny-target"
    api_key: str | None = None
    metrics_in: Literal["usage", "last", "none"] = "usage"
    newline: str = "\n"
    splits_events: bool = False


def _rounds(tokens: list[str], accepted: tuple[int, ...], use_draft: bool) -> Iterator[tuple[int, list[dict]]]:
    """Yield (acceptance length or 0, pieces) of the prefill and every round."""
    yield 0, [{"text": tokens[0], "source": "target"}]
    at = 1
    number = 0
    while at < len(tokens):
        drafts = accepted[number % len(accepted)] if use_draft else 0
        own = ("bonus" if drafts == BLOCK else "corrected") if use_draft else "target"
        sources = ["drafted"] * drafts + [own]
        texts = tokens[at : at + len(sources)]
        yield (
            len(texts) if use_draft else 0,
            [{"text": text, "source": source} for text, source in zip(texts, sources, strict=False)],
        )
        at += len(sources)
        number += 1


class PageServer(ThreadingHTTPServer):
    """Serves the page and a scripted API on a free port of the loopback address.

    Attributes:
        requests: bodies of the chat requests so far.
        num_disconnects: streams that the page left before their end.
    """

    daemon_threads = True

    def __init__(self, page: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = page
        self.behaviour = Behaviour()
        self.requests: list[dict[str, Any]] = []
        self.num_disconnects = 0
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def __enter__(self) -> "PageServer":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: a page that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, status: int, body: str, content_type: str, headers: dict[str, str] | None = None) -> None:
        data = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _send_json(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body), "application/json", headers)

    def _is_refused(self) -> bool:
        key = self.server.behaviour.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        error = {"message": "missing or wrong API key", "type": "authentication_error", "param": None, "code": None}
        self._send_json(401, {"error": error})
        return True

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        if self.path == "/":
            policy = {"Content-Security-Policy": content_security_policy(self.server.page)}
            self._send(200, self.server.page, "text/html; charset=utf-8", policy)
        elif self._is_refused():
            pass
        elif self.path == "/ready" and behaviour.loading:
            error = {"message": behaviour.loading, "type": "service_unavailable", "param": None, "code": None}
            self._send_json(503, {"error": error})
        elif self.path == "/ready":
            self._send_json(200, {"status": "ready"})
        elif self.path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [{"id": behaviour.model, "max_model_len": 2048}]})
        else:
            self._send_json(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        self.server.requests.append(body)
        behaviour = self.server.behaviour
        if behaviour.refusal:
            self._send_json(*behaviour.refusal[:1], {"error": behaviour.refusal[1]}, behaviour.refusal[2])
            return
        if body.get("model", behaviour.model) != behaviour.model:
            self._send_json(404, {"error": {"message": "the model is not served here", "type": "not_found_error"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.num_disconnects += 1

    def _event(self, data: dict | str) -> None:
        behaviour = self.server.behaviour
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        raw = f": keep-alive\n\ndata: {text}\n\n".replace("\n", behaviour.newline).encode()
        first_wide = next((i for i, byte in enumerate(raw) if byte >= 0x80), len(raw) // 2)
        parts = (raw[: first_wide + 1], raw[first_wide + 1 :]) if behaviour.splits_events else (raw,)
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()
            if behaviour.splits_events:
                time.sleep(0.03)  # so that the network does not put them together again

    def _chunk(self, delta: dict, **choice: Any) -> dict:
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, **choice}]}

    def _stream(self, body: dict) -> None:
        behaviour = self.server.behaviour
        use_draft = body["use_draft"]
        tokens = behaviour.tokens if use_draft or behaviour.plain_tokens is None else behaviour.plain_tokens
        self._event(self._chunk({"role": "assistant", "content": ""}))
        lengths: list[int] = []
        num_sent = num_rounds = 0
        for length, pieces in _rounds(tokens, behaviour.accepted, use_draft):
            time.sleep(behaviour.round_s)
            self._event(self._chunk({"content": "".join(piece["text"] for piece in pieces)}, token_sources=pieces))
            num_sent += len(pieces)
            num_rounds += 1
            lengths += [length] if length else []
            if behaviour.fault_after is not None and num_sent >= behaviour.fault_after:
                self._event({"error": {"message": "logits are not finite", "type": "server_error", "code": None}})
                return
            if behaviour.cut_after is not None and num_sent >= behaviour.cut_after:
                return
        decode_s = behaviour.step_s * (num_rounds - 1)
        speculative = {
            "mean_acceptance_length": sum(lengths) / len(lengths) if lengths else None,
            "acceptance_rate": (sum(lengths) - len(lengths)) / (BLOCK * len(lengths)) if lengths else None,
            "num_drafts": len(lengths),
            "acceptance_length_histogram": {str(n): lengths.count(n) for n in range(1, BLOCK + 2)} if lengths else None,
        }
        metrics = {
            "speculative_decoding": speculative,
            "time_to_first_token_s": behaviour.step_s,
            "decode_s": decode_s,
            "tokens_per_s": (len(tokens) - 1) / decode_s if decode_s > 0 else None,
        }
        last = self._chunk({}, finish_reason="stop")
        with_metrics = {"metrics": metrics}
        self._event(last | (with_metrics if behaviour.metrics_in == "last" else {}))
        usage = {"prompt_tokens": 10, "completion_tokens": len(tokens), "total_tokens": 10 + len(tokens)}
        ending = {"object": "chat.completion.chunk", "choices": [], "usage": usage}
        self._event(ending | (with_metrics if behaviour.metrics_in == "usage" else {}))
        self._event("[DONE]")
