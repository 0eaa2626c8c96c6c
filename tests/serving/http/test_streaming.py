"""Event streams: chunk by chunk what a whole answer says, and nothing lost between."""

import json
import time

import httpx
import pytest

from tests.serving.http.byte_codec import EOS
from tests.serving.http.fake_engine import FakeEngine

TEXT = "Hé 😀 world <stop> tail, and some more text after it."
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def server(serve_module):
    return serve_module(FakeEngine(script=[*TEXT.encode(), EOS]))


@pytest.mark.parametrize("fields", [{}, {"stop": "<stop>"}, {"max_tokens": 5}, {"max_tokens": 10, "stop": "zz"}])
@pytest.mark.parametrize("form", ["chat", "complete"])
def test_a_stream_joins_to_the_whole_answer(server, form, fields):
    fields = {**fields, "return_token_sources": True, "stream_options": {"include_usage": True}}
    if form == "chat":
        fields["logprobs"] = True
        whole = server.chat(**{**fields, "stream_options": None}).json()
        chunks = server.chat_stream(**fields)
        text = [c["choices"][0]["delta"]["content"] for c in chunks[:-1]]
        expected = whole["choices"][0]["message"]["content"]
        logprobs = [entry for c in chunks[:-1] for entry in c["choices"][0]["logprobs"]["content"]]
        assert logprobs == whole["choices"][0]["logprobs"]["content"]
    else:
        fields |= {"logprobs": 1, "echo": True}
        whole = server.complete(**{**fields, "stream_options": None}).json()
        chunks = server.stream("/v1/completions", {"prompt": "hi", **fields})
        text = [c["choices"][0]["text"] for c in chunks[:-1]]
        expected = whole["choices"][0]["text"]
        for name, values in whole["choices"][0]["logprobs"].items():
            assert [v for c in chunks[:-1] for v in c["choices"][0]["logprobs"][name]] == values
    assert "".join(text) == expected
    for chunk, piece in zip(chunks[:-1], text, strict=True):
        assert "".join(s["text"] for s in chunk["choices"][0]["token_sources"]) == piece
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + [whole["choices"][0]["finish_reason"]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("rounds_per_call", [1, 3])
def test_one_chunk_a_round_neither_split_nor_merged(serve, rounds_per_call):
    server = serve(FakeEngine(script=[*b"x" * 40], rounds=(3, 1, 5, 2), rounds_per_call=rounds_per_call))
    chunks = server.chat_stream(max_tokens=20)
    assert [len(c["choices"][0]["delta"]["content"]) for c in chunks] == [1, 3, 1, 5, 2, 3, 1, 4]


def test_the_role_comes_first_and_once_a_choice(server):
    chunks = server.chat_stream(n=3)
    roles = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        roles.setdefault(choice["index"], []).append(choice["delta"].get("role"))
    assert sorted(roles) == [0, 1, 2]
    assert all(r[0] == "assistant" and set(r[1:]) == {None} for r in roles.values())
    assert sum(c["choices"][0]["finish_reason"] is not None for c in chunks) == 3


def test_usage_in_every_chunk_on_request(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.chat_stream(stream_options=options, max_tokens=9)
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == [1, 4, 5, 9, 9]
    assert "usage" not in server.chat_stream(max_tokens=2)[0]


def test_the_three_counts_agree(serve):
    server = serve(FakeEngine(rounds=(3, 1, 5, 8, 2), rounds_per_call=2))
    num_rounds = num_tokens = num_accepted = 0
    for n, stop in ((1, None), (2, None), (1, "a"), (3, "b")):
        fields = {"max_tokens": 33, "return_metrics": True, "stream_options": {"include_usage": True}}
        chunks = server.chat_stream(n=n, stop=stop, seed=5, **fields)
        measured = chunks[-1]["metrics"]["speculative_decoding"]
        num_chunks = len(chunks) - 1
        assert measured["num_drafts"] == num_chunks - n, "a chunk a round, and one a prefill"
        assert sum(measured["acceptance_length_histogram"].values()) == measured["num_drafts"]
        mean = 1 + measured["num_accepted_tokens"] / measured["num_drafts"]
        assert measured["mean_acceptance_length"] == pytest.approx(mean)
        assert measured["num_draft_tokens"] == 7 * measured["num_drafts"]
        whole = server.chat(n=n, stop=stop, seed=5, max_tokens=33, return_metrics=True).json()
        assert whole["metrics"]["speculative_decoding"] == measured
        assert whole["usage"] == chunks[-1]["usage"]
        num_rounds += 2 * measured["num_drafts"]
        num_tokens += 2 * whole["usage"]["completion_tokens"]
        num_accepted += 2 * measured["num_accepted_tokens"]
    assert server.metric("vllm:spec_decode_num_drafts_total") == num_rounds
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == 7 * num_rounds
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") == num_accepted
    assert server.metric("vllm:spec_decode_num_accepted_tokens_per_pos_total") == num_accepted
    assert server.metric("vllm:generation_tokens_total") == num_tokens


def test_metrics_come_with_the_last_chunk(server):
    chunks = server.chat_stream(return_metrics=True)
    assert "metrics" in chunks[-1] and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("metrics" in chunk for chunk in chunks[:-1])


def test_the_bytes_of_a_stream(server):
    response = server.client.post(CHAT, json={**BODY, "stream": True, "max_tokens": 2})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    events = response.content.split(b"\n\n")
    assert events[-1] == b"" and events[-2] == b"data: [DONE]"
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events[:-1])


def test_a_fault_in_mid_stream_is_told(serve):
    server = serve(FakeEngine(fail_after=3))
    response = server.client.post(CHAT, json={**BODY, "stream": True})
    events = [line for line in response.text.split("\n\n") if line]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert "logits are not finite" in error["message"] and error["type"] == "server_error"
    assert len(events) == 5 and "[DONE]" not in response.text


def test_a_failed_choice_ends_its_request_and_cancels_the_others(serve):
    engine = FakeEngine(round_s=0.01)
    server = serve(engine)
    run_round = engine._run_round

    def fail_second(row):
        engine.settings.fail_after = 2 if row.request.request_id.endswith("2") else None
        return run_round(row)

    engine._run_round = fail_second
    assert server.chat(n=3).status_code == 500
    server.wait_until_idle()
    assert len(engine.cancelled) == 2


def test_a_deadline_in_mid_stream_is_told(serve):
    server = serve(FakeEngine(round_s=0.05), request_timeout_s=0.3)
    response = server.client.post(CHAT, json={**BODY, "stream": True})
    assert '"code":"request_timeout"' in response.text and "[DONE]" not in response.text
    server.wait_until_idle()


def test_comments_keep_a_waiting_stream_alive(serve):
    server = serve(FakeEngine(round_s=0.25), keep_alive_comment_s=0.05)
    response = server.client.post(CHAT, json={**BODY, "stream": True, "max_tokens": 2})
    assert response.text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve, streams):
    engine = FakeEngine(round_s=0.02, rounds=(1,), num_slots=2)
    server = serve(engine)
    body = {**BODY, "stream": streams, "n": 2, "ignore_eos": True}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=server.url, timeout=0.3) as client,
        client.stream("POST", CHAT, json=body) as response,
    ):
        for _ in response.iter_bytes():
            time.sleep(0.1)
            raise httpx.ReadTimeout("enough")
    server.wait_until_idle(2.0)
    assert len(engine.cancelled) == 2
    assert server.metric("vllm:request_success_total", finished_reason="abort") == 2


def test_a_stop_string_cancels_what_the_engine_still_does(serve):
    engine = FakeEngine(script=[*b"abcd", *b"e" * 300], round_s=0.01, ignores_cancel=3)
    server = serve(engine)
    answer = server.chat(stop="cd", return_metrics=True).json()
    assert answer["choices"][0]["message"]["content"] == "ab"
    server.wait_until_idle()
    assert len(engine.cancelled) == 1
    assert server.metric("vllm:generation_tokens_total") == answer["usage"]["completion_tokens"] == 4
    drafts = answer["metrics"]["speculative_decoding"]["num_drafts"]
    assert server.metric("vllm:spec_decode_num_drafts_total") == drafts == 1


def test_many_streams_share_a_delivery(serve):
    engine = FakeEngine(num_slots=16, round_s=0.02)
    server = serve(engine)
    chunks = server.chat_stream(n=16, max_tokens=12, seed=1)
    texts = [""] * 16
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    whole = server.chat(n=16, max_tokens=12, seed=1).json()
    assert texts == [c["message"]["content"] for c in whole["choices"]]
    assert engine.calls_of_deliver < 16
