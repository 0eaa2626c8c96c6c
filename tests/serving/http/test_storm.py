"""Five hundred requests that are cancelled, time out, fail or lose their client: nothing of them stays."""

import asyncio
import random

import httpx
import pytest

from tests.serving.http.fake_engine import FakeEngine

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}


async def storm(url, count, n):
    outcomes = {}
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=20, limits=limits) as client:

        async def one(number):
            kind = ("whole", "leave", "leave_early", "stop", "stream", "bad", "slow")[number % 7]
            body = {**BODY, "seed": number, "n": n}
            await asyncio.sleep(rng.random() * 2)
            path = "/v1/chat/completions"
            try:
                if kind == "bad":
                    status = (await client.post(path, json={**body, "temperature": -1})).status_code
                elif kind in ("whole", "stop", "slow"):
                    # 400 tokens take longer than the deadline even alone.
                    extra = {"stop": {"stop": ["a", "e"]}, "slow": {"max_tokens": 400, "ignore_eos": True}}.get(
                        kind, {}
                    )
                    status = (await client.post(path, json={**body, **extra})).status_code
                elif kind == "leave_early":
                    await asyncio.wait_for(client.post(path, json=body), rng.random() * 0.05)
                    status = 200
                else:
                    async with client.stream("POST", path, json={**body, "stream": True}) as response:
                        status, seen = response.status_code, 0
                        async for _ in response.aiter_bytes():
                            seen += 1
                            if kind == "leave" and seen > 2:
                                break
            except (TimeoutError, httpx.TransportError) as error:
                status = type(error).__name__
            outcomes[kind, status] = outcomes.get((kind, status), 0) + 1

        await asyncio.gather(*(one(number) for number in range(count)))
    return outcomes


@pytest.mark.parametrize("ignores_cancel, n", [(0, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_gauges_return_to_zero_after_a_storm(serve, ignores_cancel, n):
    engine = FakeEngine(round_s=0.003, num_slots=4, max_waiting=8, ignores_cancel=ignores_cancel)
    server = serve(engine, request_timeout_s=0.4)
    outcomes = asyncio.run(storm(server.url, 500, n))
    server.wait_until_idle()
    statuses = {status for _, status in outcomes}
    assert statuses <= {200, 400, 429, 504, "TimeoutError"}, outcomes
    assert {200, 400, 429, 504} <= statuses, outcomes
    assert sum(outcomes.values()) == 500
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert server.metric(gauge) == 0
    ended = server.metric("vllm:request_success_total")
    # Where the queue had room for the first of two choices alone, the first was taken back and counts nowhere.
    assert ended == len(engine.submitted) if n == 1 else ended <= len(engine.submitted)
    assert server.chat(max_tokens=3).json()["usage"]["completion_tokens"] == 3
