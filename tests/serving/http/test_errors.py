"""Every mistake gets its status and the one body form."""

import json
import logging
import threading

import pytest

from domino_jax.records import TokenEvent
from tests.serving.http.byte_codec import ByteCodec
from tests.serving.http.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(serve_module):
    return serve_module(FakeEngine(script=[*b"fine", 256]))


def check(response, status, *words, param=...):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(str(word) in error["message"] for word in words), error
    assert len(response.text) < 1000
    for forbidden in ("Traceback", "/tmp", "site-packages", ".py", "pydantic"):
        assert forbidden not in response.text
    if param is not ...:
        assert error["param"] == param
    assert response.headers["x-request-id"]
    return error


BAD_FIELDS = [
    ("messages", "text"), ("messages", []), ("messages", None), ("messages", [{}]), ("messages", ["x"]),
    ("messages", [{"role": "robot", "content": "x"}]), ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages", [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("temperature", -1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True), ("top_p", 0),
    ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("top_k", "3"), ("min_p", -0.1), ("min_p", 1.1),
    ("seed", 1.5), ("seed", 2**63), ("seed", "x"), ("stop", 5), ("stop", ""), ("stop", [""]), ("stop", ["a"] * 17),
    ("stop", "a" * 1025), ("stop", [5]), ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [300]),
    ("stop_token_ids", [2**40]), ("stop_token_ids", [1] * 17), ("ignore_eos", "yes"), ("ignore_eos", 1),
    ("min_tokens", -1), ("min_tokens", 10_000), ("n", 0), ("n", 129), ("n", "2"), ("stream", "true"),
    ("stream_options", {"include_usage": True}), ("stream_options", 5), ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5), ("repetition_penalty", 0), ("repetition_penalty", 2.5), ("logit_bias", {"x": 1}),
    ("logit_bias", {"300": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"٣": 1}), ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "x"}), ("logit_bias", [1]), ("skip_special_tokens", 1), ("use_draft", "no"),
    ("block_size", 1), ("block_size", 7), ("block_size", "6"),
    ("return_metrics", 1), ("return_token_sources", "x"), ("max_tokens", 0), ("max_tokens", -5),
    ("max_tokens", 1.5), ("max_tokens", 10_000), ("max_tokens", 2**31), ("max_completion_tokens", 0),
    ("top_logprobs", 2), ("top_logprobs", -1), ("logprobs", 3), ("chat_template_kwargs", "x"),
    ("model", 5), ("user", 5),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD_FIELDS, ids=lambda v: str(v)[:40])
def test_a_bad_value_in_a_chat_names_its_field(server, name, value):
    response = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, name: value})
    error = check(response, 400)
    assert error["param"].split(".")[0] == name and name in error["message"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", ["a", ""]), ("prompt", [300]),
        ("prompt", [-1]), ("prompt", [1.5]), ("prompt", ["a", 1]), ("prompt", {"a": 1}), ("prompt", [[1], "a"]),
        ("prompt", ["a"] * 129), ("max_tokens", 0), ("logprobs", 6), ("logprobs", True), ("echo", 1), ("n", 200),
        ("best_of", 3), ("suffix", "x"), ("max_completion_tokens", 3),
    ],
)  # fmt: skip
def test_a_bad_value_in_a_completion_names_its_field(server, name, value):
    response = server.client.post("/v1/completions", json={"prompt": "hi", name: value})
    error = check(response, 400)
    named = "n" if value == ["a"] * 129 else name
    assert error["param"].split(".")[0] == named


@pytest.mark.parametrize(
    "name, value",
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "auto"), ("functions", [{}]), ("function_call", "auto"),
        ("response_format", {"type": "json_object"}), ("guided_json", {"a": 1}), ("guided_regex", "a"),
        ("structured_outputs", {"json": {}}), ("audio", {"voice": "x"}), ("reasoning_effort", "high"), ("echo", True),
        ("prompt_logprobs", 1), ("bad_words", ["x"]), ("best_of", 2), ("use_beam_search", True),
        ("prediction", {"a": 1}),
        ("add_generation_prompt", False), ("continue_final_message", True), ("chat_template", "{{ x }}"),
        ("modalities", ["audio"]), ("allowed_token_ids", [1]), ("truncate_prompt_tokens", 4),
    ],
)  # fmt: skip
def test_known_but_unsupported_fields_are_refused_by_name(server, name, value):
    error = check(server.chat(**{name: value}), 400, name, "not supported", param=name)
    assert error["code"] == "unsupported_parameter"


def test_unknown_fields_are_accepted_and_told_once(server, caplog):
    with caplog.at_level(logging.INFO, "domino_jax.serving"):
        logging.getLogger("domino_jax.serving").propagate = True
        for _ in range(3):
            assert server.chat(my_own_field="x").status_code == 200
    told = [r for r in caplog.records if r.getMessage() == "unknown_field"]
    assert [r.fields["field"] for r in told] == ["my_own_field"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"{'a': 1}", b'{"messages": NaN}', b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"prompt": "\\ud800"}', b'{"prompt": "a"} x',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
    ],
    ids=lambda raw: ascii(raw[:30]),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(server, path, raw):
    check(server.client.post(path, content=raw, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("number", ["1e999", "9" * 5000, "-" + "9" * 5000, "1e-999999999x", "0x10", "01", "+1"])
def test_numbers_out_of_reach(server, number):
    raw = f'{{"prompt": "a", "seed": {number}}}'.encode()
    check(server.client.post("/v1/completions", content=raw, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types_start_no_work(server, kind):
    before = len(server.engine.submitted)
    body = json.dumps({"messages": MESSAGES})
    check(server.client.post("/v1/chat/completions", content=body, headers={"content-type": kind}), 400, "Content-Type")
    assert len(server.engine.submitted) == before


def test_unknown_model_path_and_method(server):
    check(server.chat(model="gpt"), 404, "gpt", "fake", param="model")
    check(server.complete(model="gpt"), 404)
    check(server.client.get("/v1/models/gpt"), 404)
    check(server.client.get("/v1/nothing"), 404)
    response = server.client.get("/v1/completions")
    check(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_prompt_over_the_context_tells_both_numbers(server):
    check(server.complete("x" * 600), 400, 600, 512, param="prompt")
    check(server.complete("x" * 512), 400, 512)
    error = check(server.complete("x" * 500, max_tokens=13), 400, 500, 13, 512, param="max_tokens")
    assert error["code"] == "context_length_exceeded"
    assert server.complete("x" * 500, max_tokens=12).status_code == 200
    check(server.chat("x" * 600), 400, 512)
    check(server.complete(["a", "x" * 600]), 400, 600, 512)


def test_two_budgets_that_differ(server):
    check(server.chat(max_tokens=3, max_completion_tokens=4), 400, 3, 4)


def test_a_template_that_refuses(server):
    check(server.chat(chat_template_kwargs={"fails": True}), 400, "roles must alternate", param="messages")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "add_generation_prompt", "conversation"])
def test_a_request_brings_no_template_of_its_own(server, name):
    messages = [{"role": "user", "content": "hi"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": messages, "chat_template_kwargs": {name: "{{ 1 }}", "enable_thinking": True}}
        check(server.client.post(path, json=body), 400, name, param=f"chat_template_kwargs.{name}")


def test_large_input_is_not_echoed(server):
    for response in (
        server.chat(model="m" * 100_000),
        server.chat(temperature="t" * 100_000),
        server.chat(logit_bias={"b" * 100_000: 1}),
        server.chat(stop_token_ids=["s" * 100_000]),
        server.client.get("/v1/models/" + "m" * 5000),
    ):
        assert response.status_code in (400, 404)
        check(response, response.status_code)


def test_a_body_over_the_limit(serve):
    server = serve(max_body_bytes=1000)
    check(server.chat("x" * 2000), 413, 1000)
    chunks = (b"x" * 100 for _ in range(30))
    check(
        server.client.post("/v1/completions", content=chunks, headers={"content-type": "application/json"}), 413, 1000
    )
    assert server.chat("x").status_code == 200


def test_too_many_messages(serve):
    server = serve(max_messages=3)
    check(server.client.post("/v1/chat/completions", json={"messages": MESSAGES * 4}), 400, 4, 3, param="messages")


def test_a_full_queue(serve):
    engine = FakeEngine(num_slots=1, max_waiting=1, round_s=0.02)
    server = serve(engine)
    response = server.chat(n=5)
    check(response, 429)
    assert int(response.headers["retry-after"]) >= 1
    server.wait_until_idle()
    assert server.chat(max_tokens=2).status_code == 200


def test_loading_and_draining(serve):
    server = serve(FakeEngine(load_s=0.5))
    response = server.chat()
    check(response, 503, "compiled 3/12")
    assert response.headers["retry-after"]
    check(server.client.get("/ready"), 503, "compiled 3/12")
    assert server.client.get("/health").status_code == 200
    server = serve()
    assert server.client.get("/ready").json() == {"status": "ready"}
    server.service.drain()
    check(server.chat(), 503, "shutting down")
    check(server.client.get("/ready"), 503)
    assert server.client.get("/health").status_code == 200


def test_an_engine_that_raises_on_submit_is_a_fault_of_the_server(serve):
    engine = FakeEngine()
    engine.submit = lambda request: 1 / 0
    server = serve(engine)
    check(server.chat(), 500, "log")
    assert server.service.router.num_open == 0


def test_an_engine_that_ends_without_answering(serve):
    engine, ends = FakeEngine(), threading.Event()
    server = serve(engine)

    def hang(row):
        engine._failure = "the device is lost"
        ends.wait(20)
        return TokenEvent(row.request.request_id, finish_reason="error")

    engine._run_round = hang
    check(server.chat(), 500, "the engine has failed")
    ends.set()
    server.thread.join(5)
    assert not server.thread.is_alive() and server.server.has_failed


def test_a_failed_row_fails_its_request_alone(serve):
    server = serve(FakeEngine(fail_after=2))
    check(server.chat(), 500, "logits are not finite")
    assert server.metric("vllm:request_success_total", finished_reason="error") == 1
    assert server.chat(max_tokens=1).status_code == 200
    server.wait_until_idle()


def test_a_request_past_its_deadline_is_cancelled(serve):
    server = serve(FakeEngine(round_s=0.05), request_timeout_s=0.2)
    error = check(server.chat(), 504)
    assert error["code"] == "request_timeout"
    server.wait_until_idle()
    assert server.engine.cancelled


def test_keys(serve):
    server = serve(api_keys=("first-key", "second-key"))
    bad = ("Bearer wrong", "Basic Zm9v", "Bearer", "first-key", b"Bearer \xff\xfe", "Bearer first-ke")
    for headers in [{}, *({"authorization": value} for value in bad)]:
        for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/nothing"):
            response = server.client.get(path, headers=headers)
            check(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        check(server.client.post("/v1/completions", json={}, headers=headers), 401)
    for path in ("/health", "/"):
        assert server.client.get(path).status_code == 200
    for key in ("first-key", "second-key"):
        assert server.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_cors_is_closed_unless_opened(serve):
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    closed = serve()
    response = closed.client.options("/v1/completions", headers=preflight)
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers
    assert "access-control-allow-origin" not in closed.client.get("/health", headers=preflight).headers
    opened = serve(cors_origins=("http://a.example",), api_keys=("k",))
    assert opened.client.options("/v1/completions", headers=preflight).status_code == 200
    other = {**preflight, "origin": "http://b.example"}
    assert "access-control-allow-origin" not in opened.client.get("/health", headers=other).headers


def test_the_codec_of_the_tests_is_a_codec():
    from domino_jax.serving.http.text_codec import TextCodec

    assert isinstance(ByteCodec(), TextCodec)


def test_a_block_size_needs_a_drafter_and_drafts(server, serve):
    body = {"messages": MESSAGES, "block_size": 6}
    error = check(server.client.post("/v1/chat/completions", json=body | {"use_draft": False}), 400)
    assert error["message"] == "block_size is for drafts and use_draft is false; leave one out"
    without = serve(FakeEngine(block_sizes=()))
    error = check(without.client.post("/v1/chat/completions", json=body), 400)
    assert error["message"] == "block_size is 6; there is no drafter; leave it out"
