"""Metric names are there from the start, and count what they say."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.http.fake_engine import FakeEngine

NAMES = [
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total", "vllm:request_success_total", "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count", "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count", "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "domino_jit_compiles_total", "domino_ready",
    "domino_verify_step_seconds_count", "domino_draft_step_seconds_count",
]  # fmt: skip


def samples(server):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


@pytest.mark.parametrize("is_used", [False, True])
def test_every_name_is_there(serve, is_used):
    server = serve()
    if is_used:
        server.chat(n=2)
    names = {key[0] for key in samples(server)}
    assert [name for name in NAMES if name not in names] == []


def test_what_they_count(serve):
    server = serve(FakeEngine(rounds=(4,), script=[*b"y" * 30, 256]))
    server.chat("hello", n=2, max_tokens=9)
    server.chat("hello")
    server.wait_until_idle()
    num_prompt = len(b"user: hello\nassistant: ")
    assert server.metric("vllm:prompt_tokens_total") == 2 * num_prompt
    assert server.metric("vllm:generation_tokens_total") == 9 + 9 + 31
    assert server.metric("vllm:request_success_total", finished_reason="length") == 2
    assert server.metric("vllm:request_success_total", finished_reason="stop") == 1
    assert server.metric("vllm:time_to_first_token_seconds_count") == 3
    assert server.metric("vllm:inter_token_latency_seconds_count") == 8 + 8 + 30
    assert server.metric("vllm:e2e_request_latency_seconds_count") == 3
    assert server.metric("vllm:request_queue_time_seconds_count") == 3
    assert server.metric("vllm:spec_decode_num_drafts_total") == 2 + 2 + 8
    assert server.metric("vllm:spec_decode_num_accepted_tokens_per_pos_total", position="0") == 12
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    assert server.metric("domino_jit_compiles_total", phase="warmup") == 12
    assert server.metric("domino_jit_compiles_total", phase="serving") == 0
    assert server.metric("domino_ready") == 1
    assert server.metric("vllm:num_requests_running") == 0


def test_a_call_is_split_into_rounds_and_their_parts():
    from domino_jax.serving.contract import CallTimes
    from domino_jax.serving.http.metrics import ServerMetrics

    metrics = ServerMetrics(FakeEngine(), "m")
    metrics.observe_call(CallTimes(4, 0.8, 0.25))
    metrics.observe_call(CallTimes(1, 0.1, 0.0))
    text = metrics.render().decode()
    values = dict(line.split(" ") for line in text.splitlines() if line.startswith("domino_") and "{" not in line)
    assert float(values["domino_verify_step_seconds_sum"]) == pytest.approx(0.6 + 0.1)
    assert float(values["domino_draft_step_seconds_sum"]) == pytest.approx(0.2)
    assert (values["domino_verify_step_seconds_count"], values["domino_draft_step_seconds_count"]) == ("5.0", "4.0")


def test_the_wait_told_with_a_full_queue_is_bounded():
    from domino_jax.serving.http.metrics import ServerMetrics

    metrics = ServerMetrics(FakeEngine(), "m")
    assert metrics.estimate_wait_s(10, 1) == 1
    for _ in range(200):
        metrics.count_end("stop", 300.0)
    assert metrics.estimate_wait_s(10, 1) == 60
