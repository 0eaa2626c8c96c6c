"""The openai Python SDK against the server, sync and async, streaming and not."""

import asyncio

import openai
import pytest

from tests.serving.http.byte_codec import EOS
from tests.serving.http.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = "Hello 😀 world"


@pytest.fixture(scope="module")
def server(serve_module):
    return serve_module(FakeEngine(script=[*TEXT.encode(), EOS]), api_keys=("a-key",))


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="a-key", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, seed=1, extra_body={"return_metrics": True}
    )
    assert [c.message.content for c in answer.choices] == [TEXT] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "H"
    assert answer.usage.completion_tokens == 2 * (len(TEXT.encode()) + 1)
    assert answer.model_extra["metrics"]["speculative_decoding"]["num_drafts"] > 0


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1


def test_chat_stream_helper(client):
    with client.chat.completions.stream(model="fake", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_completions(client):
    answer = client.completions.create(model="fake", prompt=["a", "b"], logprobs=1, echo=True, max_tokens=5)
    assert [c.text for c in answer.choices] == ["aHello", "bHello"]
    assert answer.choices[0].logprobs.tokens[0] == "a"
    stream = client.completions.create(model="fake", prompt="a", stream=True)
    assert "".join(c.choices[0].text for c in stream) == TEXT


def test_models(client):
    assert [m.id for m in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"


def test_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=5)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert caught.value.request_id
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as other:
        other.models.list()


def test_an_error_in_mid_stream_is_raised(serve):
    server = serve(FakeEngine(fail_after=2))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            list(stream)


def test_a_retry_after_a_full_queue(serve):
    engine = FakeEngine(num_slots=1, max_waiting=0)
    server = serve(engine)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="fake", messages=MESSAGES)
        engine.settings.max_waiting = 4
        again = client.with_options(max_retries=2)
        assert again.chat.completions.create(model="fake", messages=MESSAGES).choices[0].message.content


def test_async(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="a-key", max_retries=0) as client:

            async def one(streams):
                answer = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=streams)
                if not streams:
                    return answer.choices[0].message.content
                return "".join([c.choices[0].delta.content async for c in answer])

            return await asyncio.gather(*(one(i % 2 == 0) for i in range(10)))

    assert asyncio.run(run()) == [TEXT] * 10


def test_closing_a_stream_early_frees_the_slot(serve):
    engine = FakeEngine(round_s=0.02, rounds=(1,))
    server = serve(engine)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        with client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream:
            next(iter(stream))
        server.wait_until_idle(2)
    assert len(engine.cancelled) == 1
