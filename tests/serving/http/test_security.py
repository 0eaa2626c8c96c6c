"""Headers, the page's policy, request ids and the log."""

import base64
import hashlib
import json
import logging
import re
import time

import pytest

from tests.serving.http.fake_engine import FakeEngine

SECRET = "my-secret-prompt-9f3"


@pytest.fixture(scope="module")
def server(serve_module):
    return serve_module(FakeEngine(script=[*b"fine", 256]))


@pytest.fixture
def log_lines(server):
    """The lines that the server writes during a test."""
    from domino_jax.serving.http.json_log import JsonFormatter

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    lines, handler = [], Keep()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("domino_jax.serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("path", ["/", "/health", "/nothing", "/metrics", "/v1/models", "/openapi.json"])
def test_security_headers(server, path):
    headers = server.client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert "server" not in headers and len(headers.get_list("content-security-policy")) == 1


def test_the_page_runs_its_own_code_alone(server):
    response = server.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    for tag in ("script", "style"):
        for block in re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.S):
            digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy


def test_the_policy_of_a_page():
    from domino_jax.serving.http.page_policy import PageError, make_policy

    policy = make_policy(b"<style>a{}</style><script>x < 1 && y\r\n</script><script type='module'>z</script>")
    digest = base64.b64encode(hashlib.sha256(b"x < 1 && y\n").digest()).decode()
    assert f"'sha256-{digest}'" in policy and policy.count("sha256") == 3
    assert "script-src 'none'" in make_policy(b"<p>no code</p>")
    for bad in (b"<p onclick='x()'>", b"<p style='color: red'>", b"<script src='x.js'></script>"):
        with pytest.raises(PageError, match="move this"):
            make_policy(bad)


def test_request_ids(server):
    assert (
        server.client.get("/health", headers={"x-request-id": "abc-1.2:3_X"}).headers["x-request-id"] == "abc-1.2:3_X"
    )
    made = [server.client.get("/health").headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    for bad in ("", "a b", "x" * 129, "a\tb", "é".encode("latin-1"), '"}'):
        assert server.client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"].startswith("req-")


def test_a_line_for_every_request_and_no_prompt_in_it(server, log_lines):
    headers = {"x-request-id": "mine"}
    body = {"messages": [{"role": "user", "content": SECRET}]}
    for extra in ({}, {"stream": True}, {"model": "x"}, {"temperature": SECRET}, {"max_tokens": 10**9}):
        server.client.post("/v1/chat/completions", json={**body, **extra}, headers=headers)
    server.client.post("/v1/completions", json={"prompt": SECRET, "logit_bias": {SECRET: 1}})
    ends_s = time.monotonic() + 5
    while len(log_lines) < 6 and time.monotonic() < ends_s:  # a line is written after its answer
        time.sleep(0.01)
    assert SECRET not in "".join(log_lines)
    rows = [json.loads(line) for line in log_lines]
    requests = [row for row in rows if row["event"] == "request"]
    assert sorted(row["status"] for row in requests) == [200, 200, 400, 400, 400, 404]
    first = next(row for row in requests if row["status"] == 200)
    assert first["request_id"] == "mine" and first["route"] == "/v1/chat/completions" and first["method"] == "POST"
    assert first["finish_reason"] == "stop" and first["completion_tokens"] == 5 and first["prompt_tokens"] > 0
    assert first["duration_s"] >= first["time_to_first_token_s"] > 0


def test_log_lines_are_escaped(server, log_lines):
    server.client.post("/v1/completions", json={"prompt": "x", 'a\n{"event":"forged"}\x1b[31m\u2028é': 1})
    server.client.get("/v1/models/%0a%7b%22event%22:%22forged%22%7d%1b")
    server.client.get("/no%0athing")
    for line in log_lines:
        assert line.isascii() and line.isprintable()
        assert json.loads(line)["event"] in ("request", "unknown_field")
    assert all("thing" not in line for line in log_lines)


def test_messages_of_other_loggers_and_tracebacks_stay_on_one_line():
    from domino_jax.serving.http.json_log import JsonFormatter

    try:
        raise ValueError("line\nbreak")
    except ValueError:
        import sys

        record = logging.LogRecord("uvicorn.error", logging.ERROR, "x", 1, "a\nb %s", ("é",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line and line.isascii()
    row = json.loads(line)
    assert row["message"] == "a\nb é" and "ValueError" in row["traceback"] and row["level"] == "error"


def test_keys_are_not_shown():
    from domino_jax.serving.http.settings import ApiSettings

    assert "secret-key" not in repr(ApiSettings("m", api_keys=("secret-key",)))


@pytest.mark.parametrize(
    "fields",
    [{"model_id": ""}, {"api_keys": ("",)}, {"api_keys": ("é",)}, {"max_choices": 0}, {"body_timeout_s": -1.0}],
)
def test_settings_out_of_range(fields):
    from domino_jax.config import ConfigError
    from domino_jax.serving.http.settings import ApiSettings

    with pytest.raises(ConfigError):
        ApiSettings(**{"model_id": "m", **fields})


@pytest.mark.parametrize("host, warns", [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True)])
def test_a_public_address_without_a_key_is_warned_of(log_lines, host, warns):
    from domino_jax.serving.http.http_server import warn_if_exposed
    from domino_jax.serving.http.settings import ApiSettings

    warn_if_exposed(host, ApiSettings("m"))
    assert any("no API key" in line for line in log_lines) == warns
    log_lines.clear()
    warn_if_exposed(host, ApiSettings("m", api_keys=("k",)))
    assert log_lines == []
