"""The OpenAPI description: valid, and exact under a schema fuzzer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from tests.serving.http.byte_codec import EOS
from tests.serving.http.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hi"}]


def fuzz(server, folder, num_examples, *flags):
    schemathesis = shutil.which("schemathesis", path=Path(sys.executable).parent)
    assert schemathesis is not None, "schemathesis is in the extra dev"
    # What is valid by the schema alone may still ask for another model, too long a context or a stop id out of range.
    command = [schemathesis, "run", f"{server.url}/openapi.json", "--checks", "all", "--no-color"]
    command += ["--exclude-checks", "positive_data_acceptance", "--max-examples", str(num_examples)]
    command += ["--seed", "1", "--generation-database", "none", *flags]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stdout[-6000:]
    assert "Tested: 9" in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_a_fuzzer_finds_no_fault_and_no_undocumented_answer(serve, tmp_path, keys):
    server = serve(FakeEngine(max_waiting=200), api_keys=keys)
    headers = ["--header", "Authorization: Bearer k"] if keys else []
    if keys:
        server.client.headers["authorization"] = "Bearer k"
    fuzz(server, tmp_path, 10, "--phases", "fuzzing" if keys else "examples,coverage,fuzzing", *headers)
    server.wait_until_idle()
    assert server.chat(max_tokens=1).status_code == 200


@pytest.mark.slow
def test_a_fuzzer_at_length(serve, tmp_path):
    server = serve(FakeEngine(max_waiting=200))
    fuzz(server, tmp_path, 200)
    server.wait_until_idle()


@pytest.mark.slow
def test_a_fuzzer_against_a_failing_and_a_full_engine(serve, tmp_path):
    # 500 is documented here and asked for; what is looked for are undocumented forms and statuses.
    for engine in (FakeEngine(fail_after=1), FakeEngine(num_slots=1, max_waiting=1), FakeEngine(load_s=1000.0)):
        server = serve(engine)
        fuzz(server, tmp_path, 20, "--exclude-checks", "positive_data_acceptance,not_a_server_error")


def test_answers_have_the_described_form(serve):
    from domino_jax.serving.http import response_types as types

    server = serve(FakeEngine(script=[*b"hello", EOS]))
    fields = {"return_metrics": True, "return_token_sources": True, "n": 2}
    chat, text = {**fields, "logprobs": True, "top_logprobs": 1}, {**fields, "logprobs": 1, "echo": True}
    for form in ({}, chat):
        types.ChatAnswer.model_validate_json(server.chat(**form).text)
        for chunk in server.chat_stream(stream_options={"include_usage": True}, **form):
            types.ChatChunk.model_validate(chunk)
    for form in ({}, text):
        types.CompletionAnswer.model_validate_json(server.complete(**form).text)
        for chunk in server.stream("/v1/completions", {"prompt": "x", **form}):
            types.CompletionChunk.model_validate(chunk)
    types.ModelList.model_validate_json(server.client.get("/v1/models").text)
    types.ErrorAnswer.model_validate_json(server.chat(n=0).text)
    with pytest.raises(pydantic.ValidationError):
        types.ErrorAnswer.model_validate({"error": {"message": "x"}})


def test_every_status_that_a_route_answers_with_is_described(serve):
    description = serve().client.get("/openapi.json").json()
    chat = description["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", "400", "401", "404", "405", "408", "413", "429", "431", "500", "503", "504"}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    text = json.dumps(description)
    for name in ("ChatBody", "CompletionBody", "ChatChunk", "CompletionChunk"):
        assert f'"#/components/schemas/{name}"' in text and name in description["components"]["schemas"]
    properties = description["components"]["schemas"]["ChatBody"]["properties"]
    assert properties["tools"]["enum"] == [None, False, [], {}, ""]
    assert {"use_draft", "return_token_sources", "return_metrics", "max_completion_tokens"} <= set(properties)
