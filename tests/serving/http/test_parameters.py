"""Every parameter reaches the engine or the text; none is ignored."""

import pytest

from tests.serving.http.byte_codec import EOS
from tests.serving.http.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hi"}]
IDS = list(b"Hello world, STOP it")


@pytest.fixture(scope="module")
def shared(serve_module):
    return serve_module(FakeEngine(script=[*IDS, EOS]))


@pytest.fixture
def server(shared):
    shared.wait_until_idle()
    shared.engine.submitted.clear()
    return shared


def last_request(server):
    return server.engine.submitted[-1]


@pytest.mark.parametrize(
    "fields, read, value",
    [
        ({"temperature": 0.5}, lambda r: r.sampling.temperature, 0.5),
        ({"temperature": 0}, lambda r: r.sampling.temperature, 0.0),
        ({}, lambda r: r.sampling.temperature, 1.0),
        ({"top_p": 0.25}, lambda r: r.sampling.top_p, 0.25),
        ({"top_k": 7}, lambda r: r.sampling.top_k, 7),
        ({"top_k": -1}, lambda r: r.sampling.top_k, 0),
        ({"min_p": 0.125}, lambda r: r.sampling.min_p, 0.125),
        ({"seed": 11}, lambda r: r.sampling.seed, 11),
        ({"seed": -1}, lambda r: r.sampling.seed, 2**32 - 1),
        ({"presence_penalty": 0.5}, lambda r: r.penalties.presence, 0.5),
        ({"frequency_penalty": -0.5}, lambda r: r.penalties.frequency, -0.5),
        ({"repetition_penalty": 1.5}, lambda r: r.penalties.repetition, 1.5),
        ({"logit_bias": {"65": -100, "7": 2.5}}, lambda r: dict(r.logit_bias), {65: -100.0, 7: 2.5}),
        ({"stop_token_ids": [5, 6]}, lambda r: r.stop_ids, (EOS, 5, 6)),
        ({"ignore_eos": True, "stop_token_ids": [5]}, lambda r: r.stop_ids, (5,)),
        ({"min_tokens": 4}, lambda r: r.min_new_tokens, 4),
        ({"max_tokens": 3}, lambda r: r.max_new_tokens, 3),
        ({"use_draft": False}, lambda r: r.use_draft, False),
        ({}, lambda r: r.use_draft, True),
        ({"block_size": 6}, lambda r: r.block_size, 6),
        ({}, lambda r: r.block_size, None),
        ({"user": "someone", "metadata": {"a": "b"}}, lambda r: r.num_top_logprobs, None),
    ],
)
@pytest.mark.parametrize("path", ["chat", "complete"])
def test_a_value_reaches_the_engine(server, path, fields, read, value):
    response = getattr(server, path)(**fields)
    assert response.status_code == 200, response.text
    assert read(last_request(server)) == value


def test_max_completion_tokens_and_the_clamp(server):
    server.chat(max_completion_tokens=5)
    assert last_request(server).max_new_tokens == 5
    server.chat()
    request = last_request(server)
    assert len(request.prompt_ids) + request.max_new_tokens == server.engine.max_model_len


def test_content_as_parts_and_roles(server):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    server.client.post("/v1/chat/completions", json={"messages": messages}).raise_for_status()
    assert bytes(last_request(server).prompt_ids) == b"system: be kind\nuser: one\ntwo\nassistant: "


def test_template_variables(server):
    server.chat(chat_template_kwargs={"enable_thinking": False})
    assert b"thinking=False" in bytes(last_request(server).prompt_ids)


@pytest.mark.parametrize(
    "fields, text, reason",
    [
        ({}, "Hello world, STOP it", "stop"),
        ({"stop": "STOP"}, "Hello world, ", "stop"),
        ({"stop": ["it", "wor"]}, "Hello ", "stop"),
        ({"stop": "STOP", "include_stop_str_in_output": True}, "Hello world, STOP", "stop"),
        ({"stop": "l", "min_tokens": 6}, "Hello wor", "stop"),
        ({"max_tokens": 5}, "Hello", "length"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "Hello world, STOP it<|256|>", "stop"),
    ],
)
def test_text_and_ending(server, fields, text, reason):
    choice = server.chat(**fields).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
    choice = server.complete(**fields).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)


def test_usage_counts_up_to_the_token_that_completes_a_stop_string(server):
    usage = server.chat(stop="world").json()["usage"]
    assert usage["completion_tokens"] == len("Hello world")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] // 2


def test_n_choices_have_seeds_one_apart(serve):
    server = serve()
    choices = server.chat(n=3, seed=7, temperature=1).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2]
    assert [r.sampling.seed for r in server.engine.submitted] == [7, 8, 9]
    alone = server.chat(seed=8, temperature=1).json()["choices"][0]
    assert alone["message"]["content"] == choices[1]["message"]["content"] != choices[0]["message"]["content"]


def test_without_a_seed_each_request_has_one_of_its_own(server):
    for _ in range(3):
        server.chat()
    assert len({r.sampling.seed for r in server.engine.submitted}) == 3


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_forms_of_a_prompt(server, prompt, prompts):
    answer = server.complete(prompt, n=2, seed=0, max_tokens=2).json()
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(prompts)))
    assert [bytes(r.prompt_ids) for r in server.engine.submitted] == [p for p in prompts for _ in range(2)]
    assert [r.sampling.seed for r in server.engine.submitted] == [0, 1] * len(prompts)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 4 * len(prompts)


def test_chat_logprobs(server):
    content = server.chat(logprobs=True, top_logprobs=2, stop="lo").json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list("Hello")
    assert content[0]["bytes"] == [72] and content[0]["logprob"] == -0.5
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["H", "I"]
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert server.chat().json()["choices"][0]["logprobs"] is None


def test_completion_logprobs(server):
    logprobs = server.complete(logprobs=1, max_tokens=3).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["H", "e", "l"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"H": -0.5}, {"e": -0.5}, {"l": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_a_token_that_is_no_text_by_itself_is_told_as_bytes(serve):
    server = serve(FakeEngine(script=[0xC3, 0xA9, EOS]))
    logprobs = server.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "<|256|>"]
    assert server.complete().json()["choices"][0]["text"] == "é"


def test_minus_infinity_is_told_as_a_number(serve):
    from domino_jax.records import TokenLogprobs

    engine = FakeEngine(script=[97, EOS])
    engine._score = lambda token_id, request: TokenLogprobs(float("-inf"), [(token_id, float("-inf"))])
    logprobs = serve(engine).complete(logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]


def test_echo(server):
    choice = server.complete("Say", echo=True, max_tokens=5).json()["choices"][0]
    assert choice["text"] == "SayHello"
    choice = server.complete([83, 97], echo=True, logprobs=0, max_tokens=2).json()["choices"][0]
    assert choice["text"] == "SaHe"
    assert choice["logprobs"]["tokens"] == ["S", "a", "H", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["top_logprobs"][0] is None


@pytest.mark.parametrize("streams", [False, True])
def test_a_prompt_is_scored_without_a_new_token(server, streams):
    before = server.metric("vllm:generation_tokens_total")
    body = {"prompt": "Say", "echo": True, "logprobs": 1, "max_tokens": 0}
    if streams:
        (chunk,) = server.stream("/v1/completions", body)
        choice = chunk["choices"][0]
    else:
        answer = server.complete(**body).json()
        choice = answer["choices"][0]
        assert answer["usage"]["completion_tokens"] == 0
    assert (choice["text"], choice["finish_reason"]) == ("Say", "length")
    assert choice["logprobs"]["tokens"] == ["S", "a", "y"]
    assert last_request(server).max_new_tokens == 1
    assert server.metric("vllm:generation_tokens_total") == before


def test_sources_join_to_the_text(server):
    choice = server.chat(return_token_sources=True, stop=", S").json()["choices"][0]
    assert "".join(piece["text"] for piece in choice["token_sources"]) == choice["message"]["content"] == "Hello world"
    assert choice["token_sources"][0] == {"text": "H", "source": "target"}
    choice = server.complete("ab", return_token_sources=True, echo=True).json()["choices"][0]
    assert choice["token_sources"][:2] == [{"text": "ab", "source": "prompt"}, {"text": "H", "source": "target"}]
    assert "token_sources" not in server.chat().json()["choices"][0]


def test_measurements_without_a_draft_are_null(server):
    measured = server.chat(return_metrics=True, use_draft=False, max_tokens=1).json()["metrics"]
    assert measured["speculative_decoding"] == {
        "mean_acceptance_length": None,
        "acceptance_rate": None,
        "num_drafts": 0,
        "num_draft_tokens": 0,
        "num_accepted_tokens": 0,
        "acceptance_length_histogram": {},
    }
    assert measured["tokens_per_s"] is None and measured["time_to_first_token_s"] > 0


def test_neutral_values_of_unsupported_fields_are_accepted(server):
    fields = {"tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "functions": None}
    assert server.chat(**fields).status_code == 200


def test_tokenize_and_detokenize(server):
    answer = server.client.post("/tokenize", json={"prompt": "hé"}).json()
    assert answer == {"count": 3, "max_model_len": 512, "tokens": list("hé".encode())}
    chat = server.client.post("/tokenize", json={"messages": MESSAGES, "model": "fake"}).json()
    assert bytes(chat["tokens"]) == b"user: hi\nassistant: "
    assert server.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé"}


def test_models(server):
    card = server.client.get("/v1/models").json()["data"][0]
    assert card["id"] == "fake" and card["max_model_len"] == 512
    assert server.client.get("/v1/models/fake").json() == card
