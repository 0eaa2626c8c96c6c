"""Prompts answered by endpoints that misbehave: what is kept, what is tried again, what stops, how it goes on."""

import errno
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from domino_jax.config import SamplingConfig
from domino_jax.data.responses import RowError, RowReport, read_chats
from domino_jax.runs import endpoint_responses as responses_module
from domino_jax.runs.endpoint_responses import (
    NumberedChat,
    read_left_out,
    regenerate_by_endpoints,
    report_left_out,
)
from domino_jax.runs.endpoint_settings import EndpointError, EndpointSettings
from domino_jax.runs.endpoints import find_served_model, sampling_fields
from domino_jax.runs.errors import EXIT_MISTAKE, EXIT_STOPPED, RunStopped, explain_or_raise
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.responses import ResponseCounts, ResponseSettings
from tests.data.test_chat_template import CHATML, make_tokenizer
from tests.runs.fake_endpoint import RESET, FakeEndpoint, Wrong, answer

NUM_CHATS = 12
SAMPLING = SamplingConfig(0.5, seed=7)
KEY = "sk-very-secret-4711"


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def serve():
    """Start endpoints that are closed in the end."""
    started = []

    def start(**options):
        started.append(FakeEndpoint(**options))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.close()


class Job:
    """Chats of a file answered by endpoints, as the command does it."""

    def __init__(self, folder):
        self.input, self.output = folder / "prompts.jsonl", folder / "r.jsonl"
        self.log = folder / "r.jsonl.bad_rows.jsonl"
        chats = [[user(f"say {i}")] for i in range(NUM_CHATS)]
        chats[3] = [
            {"role": "system", "content": "be brief"},
            user("say 3"),
            {"role": "assistant", "content": "old"},
            user("more"),
        ]
        self.write(chats)
        self.said = []

    def write(self, chats):
        rows = [json.dumps({"messages": messages}) for messages in chats]
        self.input.write_text("\n".join(["not json", *rows]) + "\n")

    def run(self, *endpoints, bad_rows="skip", tokenizer=None, enable_thinking=False, sampling=SAMPLING, **changes):
        asking = EndpointSettings(
            **{"urls": tuple(e.url for e in endpoints), "concurrency": 3, "retry_delay_s": 0.01, "grace_s": 2.0}
            | changes
        )
        monitor = RunMonitor(None, None)
        monitor.say = self.said.append
        earlier = read_left_out(self.log, self.output)
        self.report = RowReport(str(self.input), "skip", log_path=self.log)
        chats = [NumberedChat(*row) for row in read_chats(self.input, self.report, needs_answer=False)]
        self.report.bad_rows = bad_rows
        settings = ResponseSettings(9, 40 if tokenizer else None, 3, sampling, enable_thinking)
        return regenerate_by_endpoints(
            asking, "tiny", tokenizer, chats, self.output, settings, self.report,
            report_left_out(earlier, chats, self.report), monitor,
        )  # fmt: skip

    def rows(self):
        return {row["row"]: [m["content"] for m in row["messages"]] for row in read_rows(self.output)}

    def left_out(self):
        return {row["line"]: row["reason"] for row in read_rows(self.log)} if self.log.exists() else {}


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes that an undisturbed run leaves."""
    job, endpoint = Job(tmp_path_factory.mktemp("whole")), FakeEndpoint()
    job.run(endpoint)
    endpoint.close()
    return job.output.read_bytes()


def test_rows_are_in_order_and_the_targets_own(job, serve):
    first, second = serve(), serve()
    first.delay_s = second.delay_s = 0.02
    first.script["say 2"] = [answer("cut", "length")]
    second.script["say 2"] = [answer("cut", "length")]
    assert job.run(first, second) == ResponseCounts(NUM_CHATS, 0, 1)
    rows = read_rows(job.output)
    assert [row["row"] for row in rows] == list(range(NUM_CHATS))
    assert rows[5]["messages"] == [
        user("say 5"),
        {"role": "assistant", "content": "say 5! (seed 12, turn 1)", "finish_reason": "stop"},
    ]
    assert rows[2]["messages"][1] == {"role": "assistant", "content": "cut", "finish_reason": "length"}
    assert job.rows()[3] == ["be brief", "say 3", "say 3! (seed 10, turn 2)", "more", "more! (seed 10, turn 4)"]
    assert min(len(first.asked), len(second.asked)) >= 4, "both are asked"
    (followed,) = [body for body in first.asked + second.asked if body["messages"][-1]["content"] == "more"]
    assert [m.keys() for m in followed["messages"]] == [{"role", "content"}] * 4
    assert followed["messages"][2]["content"] == "say 3! (seed 10, turn 2)"


def test_settings_are_sent_as_the_servers_take_them(job, serve, monkeypatch):
    endpoint = serve()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    job.run(endpoint, enable_thinking=True)
    body = next(body for body in endpoint.asked if body["messages"] == [user("say 0")])
    headers = body.pop("headers")
    assert KEY not in json.dumps(headers), "a key for somebody else"
    del body["at"]
    assert body == {
        "model": "tiny", "messages": [user("say 0")], "max_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": True},
        "temperature": 0.5, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 7,
    }  # fmt: skip
    job.output.unlink()
    monkeypatch.setenv("THE_KEY", KEY)
    job.run(endpoint, api_key_env="THE_KEY", sampling=SamplingConfig(1.0, 20, 0.9, 0.1))
    body = next(body for body in reversed(endpoint.asked) if body["messages"] == [user(f"say {NUM_CHATS - 1}")])
    assert {name: body[name] for name in sampling_fields(SAMPLING)} == {
        "temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.0, "seed": NUM_CHATS - 1,
    }  # fmt: skip
    assert body["headers"]["authorization"] == f"Bearer {KEY}"


BROKEN = {
    "too many requests": Wrong(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.1"}),
    "server error": Wrong(500, "oops"),
    "proxy without a server": Wrong(503, "<html>"),
    "reset": RESET,
    "malformed JSON": Wrong(body='{"choices": [{'),
    "text": Wrong(body='"hello"'),
    "no choice": {**answer(""), "choices": []},
    "no message": {**answer(""), "choices": [{"index": 0, "finish_reason": "stop"}]},
    "aborted": answer("ha", "abort"),
    "slow": Wrong(body=answer("late"), after_s=1.5),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_request_that_fails_is_tried_again(job, serve, whole, name):
    endpoint = serve()
    endpoint.script["say 4"] = [BROKEN[name]]
    endpoint.script["more"] = [BROKEN[name]]
    assert job.run(endpoint, request_timeout_s=1.0 if name == "slow" else 30.0).num_answered == NUM_CHATS
    assert job.output.read_bytes() == whole
    assert len(endpoint.asked) >= NUM_CHATS + 3
    assert list(job.left_out()) == [1]


def test_the_wait_that_an_endpoint_asks_for_is_kept(job, serve):
    endpoint = serve()
    endpoint.script["say 0"] = [Wrong(429, "{}", {"Retry-After": "0.5"})]
    job.run(endpoint, concurrency=1)
    first, second = (body["at"] for body in endpoint.asked[:2])
    assert second - first >= 0.5


def test_a_row_that_the_endpoint_refuses_is_left_out_for_good(job, serve):
    endpoint = serve()
    endpoint.script["say 4"] = [Wrong(400, {"error": {"message": "5000 tokens are too many"}})] * 2
    endpoint.script["more"] = [Wrong(400, {"object": "error", "message": "too long by now"})]
    assert job.run(endpoint) == ResponseCounts(NUM_CHATS - 1, 1, 0)
    assert job.rows()[3] == ["be brief", "say 3", "say 3! (seed 10, turn 2)"], "what was answered is kept"
    assert job.left_out() == {1: "malformed JSON", 6: "refused by the endpoint"}
    assert "400: 5000 tokens are too many" in job.log.read_text()
    asked = len(endpoint.asked)
    assert job.run(endpoint) == ResponseCounts(NUM_CHATS - 1, 1, 0)
    assert len(endpoint.asked) == asked and job.left_out() == {1: "malformed JSON", 6: "refused by the endpoint"}
    job.output.unlink()
    with pytest.raises(RowError, match=r"prompts\.jsonl:6: refused by the endpoint"):
        job.run(endpoint, bad_rows="fail")


def test_a_row_without_an_answer_is_asked_again_by_the_next_start(job, serve, whole):
    endpoint = serve()
    endpoint.script["say 4"] = [Wrong(500, "{}")] * 3
    assert job.run(endpoint, max_retries=2) == ResponseCounts(NUM_CHATS - 1, 1, 0)
    assert job.left_out()[6] == "no answer"
    assert job.run(endpoint) == ResponseCounts(NUM_CHATS, 0, 0)
    assert job.output.read_bytes() == whole and list(job.left_out()) == [1]


def test_a_server_that_fails_for_all_stops_the_run(job, serve, whole):
    endpoint = serve()
    for i in range(2, NUM_CHATS):
        endpoint.script[f"say {i}"] = [Wrong(500, "{}")] * 2
    with pytest.raises(EndpointError, match=r"8 rows in a row got no usable reply in 2 tries each .*goes on"):
        job.run(endpoint, max_retries=1)
    endpoint.script.clear()
    job.run(endpoint)
    assert job.output.read_bytes() == whole


def test_requests_that_are_all_refused_stop_the_run(job, serve):
    endpoint = serve()
    job.write([[user(f"say {i}")] for i in range(30)])
    for i in range(30):
        endpoint.script[f"say {i}"] = [Wrong(400, {"message": "max_tokens is too large"})]
    with pytest.raises(EndpointError, match=r"refused each of the first 16 rows \(the last: 400: max_tokens is too"):
        job.run(endpoint)
    endpoint.script.clear()
    assert job.run(endpoint).num_answered == 30, "nothing is remembered against rows that were no reason"


def test_a_wrong_key_stops_at_once_and_is_not_told(job, serve, monkeypatch):
    endpoint = serve()
    monkeypatch.setenv("THE_KEY", KEY)
    endpoint.script["say 1"] = [Wrong(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})]
    with pytest.raises(EndpointError, match=r"answered 401: Incorrect .* \*\*\* \(the key in THE_KEY\)") as caught:
        job.run(endpoint, api_key_env="THE_KEY")
    assert KEY not in str(caught.value)
    assert all(KEY not in path.read_text() for path in job.output.parent.iterdir())
    with pytest.raises(EndpointError, match=r"variable 'NO_SUCH_KEY' \(--api-key-env\) is not set"):
        job.run(endpoint, api_key_env="NO_SUCH_KEY")


def test_a_model_that_is_not_found_stops_at_once(job, serve):
    endpoint = serve()
    endpoint.script["say 0"] = [Wrong(404, {"message": "The model `tiny` does not exist."})]
    with pytest.raises(EndpointError, match=r"answered 404: The model `tiny` does not exist\.; check --endpoint"):
        job.run(endpoint)
    assert len(endpoint.asked) < NUM_CHATS


def revive(endpoint, after_s, models=("tiny",)):
    """Let an endpoint answer again, this long after it has died."""

    def wait():
        while not endpoint.is_dead:
            time.sleep(0.01)
        time.sleep(after_s)
        endpoint.models, endpoint.dies_after, endpoint.is_dead = models, None, False

    threading.Thread(target=wait, daemon=True).start()


def test_an_endpoint_that_dies_is_put_aside_and_comes_back(job, serve, whole):
    good, bad = serve(), serve()
    good.delay_s, bad.dies_after = 0.05, 2
    revive(bad, 0.2)
    job.run(good, bad)
    assert job.output.read_bytes() == whole
    (said,) = [line for line in job.said if "cannot be reached" in line]
    assert said.startswith(bad.url) and said.endswith("the other endpoints go on")


def test_an_endpoint_that_comes_back_as_another_model_is_refused(job, serve):
    good, bad = serve(), serve()
    good.delay_s, bad.dies_after = 0.1, 1
    revive(bad, 0.1, models=("b",))
    with pytest.raises(EndpointError, match="serves no model 'tiny', it lists 'b'"):
        job.run(good, bad, max_retries=50, concurrency=1)


def test_it_answers_again(job, serve, whole):
    endpoint = serve()
    endpoint.dies_after = 5
    revive(endpoint, 0.2)
    job.run(endpoint, max_retries=12)
    assert job.output.read_bytes() == whole
    assert f"{endpoint.url} answers again" in job.said


def test_all_endpoints_dead_stops_and_goes_on_later(job, serve, whole):
    first, second = serve(), serve()
    first.dies_after = second.dies_after = 3
    with pytest.raises(
        EndpointError, match=r"no endpoint answers after 3 tries \(the last: .*the same command goes on"
    ):
        job.run(first, second, max_retries=2)
    assert 0 < len(job.rows()) < NUM_CHATS
    for endpoint in (first, second):
        endpoint.dies_after, endpoint.is_dead = None, False
    job.run(first, second)
    assert job.output.read_bytes() == whole


def test_a_limit_that_never_ends_stops(job, serve):
    endpoint = serve()
    for i in range(NUM_CHATS):
        endpoint.script[f"say {i}"] = [Wrong(429, {"message": "quota used up"})] * 99
    with pytest.raises(EndpointError, match=r"no endpoint answers after 3 tries .*quota used up"):
        job.run(endpoint, max_retries=2)
    assert list(job.left_out()) == [1], "no row is at fault"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_replies_and_goes_on_later(job, serve, whole, number):
    endpoint = serve()
    endpoint.delay_s = 1.0

    def stop_once_asked():
        while len(endpoint.asked) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_once_asked, daemon=True).start()
    with pytest.raises(RunStopped, match=r"stopped with \d+ of 12 chats to go; .*r\.jsonl keeps the rows"):
        job.run(endpoint)
    assert len(job.rows()) == 3 == len(endpoint.asked), "those in flight are kept, no more are asked"
    endpoint.delay_s = 0.0
    job.run(endpoint)
    assert job.output.read_bytes() == whole


def test_replies_that_take_too_long_are_not_waited_for(job, serve):
    endpoint = serve()
    endpoint.delay_s = 2.0
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(RunStopped, match="12 of 12 chats"):
        job.run(endpoint, grace_s=0.2)
    assert time.monotonic() - began < 1.5


def test_prompts_are_measured_where_there_is_a_tokenizer(job, serve):
    endpoint = serve()
    job.write([[user("say " * 60)], [user("say 1"), user("say " * 60)], [user("say 2")]])
    assert job.run(endpoint, tokenizer=make_tokenizer(CHATML)) == ResponseCounts(2, 1, 0)
    assert job.rows()[1] == ["say 1", "say 1! (seed 8, turn 1)"]
    assert job.left_out()[2] == "prompt too long"


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_disk_that_gets_full_is_told_and_whole_rows_are_kept(job, serve, whole, small_files, monkeypatch, is_stopped):
    endpoint = serve()
    if is_stopped:
        settle = responses_module._Run._settle

        async def settle_and_stop(self, progress):
            await settle(self, progress)
            if self._ended or any(job for _, job, _ in self._running.values()):
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.undo()

        endpoint.delay_s = 0.3
        monkeypatch.setattr(responses_module._Run, "_settle", settle_and_stop)
    first, second, *_ = whole.splitlines(keepends=True)
    small_files(len(first) + len(second) + 20)  # in the middle of the third row that ends
    with pytest.raises(OSError) as caught:
        job.run(endpoint)
    assert caught.value.errno == errno.EFBIG
    assert {path.name for path in job.output.parent.iterdir()} == {"prompts.jsonl", "r.jsonl", "r.jsonl.bad_rows.jsonl"}
    kept = [json.loads(line)["row"] for line in job.output.read_bytes().split(b"\n")[:-1]]
    assert len(kept) == 2
    small_files(resource.RLIM_INFINITY)
    asked, endpoint.delay_s = len(endpoint.asked), 0.0
    job.run(endpoint)
    assert job.output.read_bytes() == whole
    assert len(endpoint.asked) - asked == NUM_CHATS + 1 - len(kept) - (3 in kept)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_beside_the_content_is_read(job, serve, field):
    endpoint = serve()
    endpoint.script["say 1"] = [answer("one", **{field: "hm"})]
    endpoint.script["say 2"] = [answer(None, "length", **{field: "hm and"})]
    assert job.run(endpoint, enable_thinking=True).num_left_out == 1
    assert job.rows()[1] == ["say 1", "<think>\nhm\n</think>\n\none"] and job.left_out()[4] == "cut inside a thought"


def test_the_model_is_the_one_that_is_listed(serve):
    def find(*endpoints, **changes):
        urls = tuple(e.url for e in endpoints)
        return find_served_model(EndpointSettings(urls, retry_delay_s=0.01, **changes), RunMonitor(None, None))

    one, several = serve(root="/data/Tiny-1B"), serve(models=("a", "tiny"))
    assert find(one).describe() == {
        "kind": "endpoint", "model": "tiny", "root": "/data/Tiny-1B", "max_model_len": 64, "urls": [one.url],
    }  # fmt: skip
    with pytest.raises(EndpointError, match="lists 2 models: 'a', 'tiny'; choose one by --model"):
        find(several)
    with pytest.raises(EndpointError, match="serves no model 'b', it lists 'tiny'; give one of these by --model"):
        find(one, model="b")
    assert find(one, several, model="tiny").model == "tiny"
    with pytest.raises(EndpointError, match=r"serve different models: .* 'tiny', .* 'other'"):
        find(one, serve(models=("other",)))
    gone = serve()
    gone.is_dead = True
    assert find(gone, one).model == "tiny"
    with pytest.raises(
        EndpointError, match=r"no endpoint answers after 3 tries; start the server.*\n.*cannot be reached"
    ):
        find(gone, max_retries=2)
    with pytest.raises(EndpointError, match="lists no model"):
        find(serve(models=()))


def test_the_package_that_is_missing_is_named(job, serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EndpointError, match=r"pip install 'domino_jax\[endpoints\]'"):
        job.run(serve())


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("regenerate", repository / "scripts" / "regenerate_responses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(job, *endpoints):
    urls = [f"--endpoint={endpoint.url}" for endpoint in endpoints]
    return [*urls, f"--input={job.input}", f"--output={job.output}", "--temperature=0.5", "--seed=7", "--concurrency=3"]


def test_killed_at_once_the_command_goes_on_to_the_same_bytes(script, repository, job, serve, whole, capsys):
    endpoint = serve()
    endpoint.delay_s = 0.3
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, "scripts/regenerate_responses.py", *options(job, endpoint)]
    process = subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.DEVNULL)
    while not (job.output.exists() and job.output.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    arguments = script.parse_arguments(options(job, endpoint))
    assert explain_or_raise(lambda: script.run(arguments)) == EXIT_MISTAKE
    assert f"is being written to by process {process.pid} on " in capsys.readouterr().err
    process.kill()
    process.wait()
    kept = job.rows()
    assert 0 < len(kept) < NUM_CHATS
    endpoint.delay_s = 0.0
    asked = len(endpoint.asked)
    assert explain_or_raise(lambda: script.run(arguments)) == 0
    assert job.output.read_bytes() == whole
    assert len(endpoint.asked) - asked == NUM_CHATS + 1 - len(kept) - (3 in kept), "what was kept is not asked again"
    said = capsys.readouterr().out
    assert "1 skipped (1 x malformed JSON)" in said and f"target: 'tiny' of {endpoint.url}" in said
    assert said.splitlines()[-1].endswith("12 chats answered (0 answers cut by their token budget), 0 left out")
    settings = json.loads((job.output.parent / "r.jsonl.settings.json").read_text())
    assert settings["target"] == {
        "kind": "endpoint", "model": "tiny", "root": "tiny", "max_model_len": 64, "urls": [endpoint.url],
    }  # fmt: skip
    assert settings["enable_thinking"] is False and settings["num_prompts"] == 12
    assert settings["sampling"] == sampling_fields(SAMPLING), "as it was sent"

    moved = serve()
    assert explain_or_raise(lambda: script.run(script.parse_arguments(options(job, moved)))) == 0
    settings = json.loads((job.output.parent / "r.jsonl.settings.json").read_text())
    assert settings["target"]["urls"] == sorted([endpoint.url, moved.url])
    other = serve(models=("other",))
    assert explain_or_raise(lambda: script.run(script.parse_arguments(options(job, other)))) == EXIT_MISTAKE
    assert "target.model: stored 'tiny', now 'other'" in capsys.readouterr().err
    assert job.output.read_bytes() == whole


def test_the_command_stops_in_a_sentence(script, job, serve, capsys):
    endpoint = serve()
    endpoint.delay_s = 0.2

    def interrupt_once_asked():
        ends_s = time.monotonic() + 60
        while not endpoint.asked and time.monotonic() < ends_s:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_asked, daemon=True).start()
    assert explain_or_raise(lambda: script.run(script.parse_arguments(options(job, endpoint)))) == EXIT_STOPPED
    said = capsys.readouterr().err
    assert (
        said.startswith("stopped with ") and said.endswith("the same command goes on\n") and len(said.splitlines()) == 1
    )
