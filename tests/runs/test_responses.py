"""Prompts answered by a random target: whose words they are, what is left out, and how an interrupted job goes on."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from domino_jax.checkpoints.huggingface import load_target, save_target
from domino_jax.config import SamplingConfig
from domino_jax.data.chat_template import encode_prompt, load_tokenizer, render_chat
from domino_jax.data.responses import read_chats
from domino_jax.decoding.generate import Decoder
from domino_jax.records import Generation
from domino_jax.runs import monitor as monitor_module
from domino_jax.runs import responses as responses_module
from domino_jax.runs.errors import EXIT_MISTAKE, EXIT_STOPPED, RunStopped, explain_or_raise
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.responses import ResponseCounts, ResponseSettings, hold_output, regenerate

# A random target never chooses its end token on purpose: every fourth id ends a text here.
STOP_IDS = tuple(range(3, 300, 4))
MAX_NEW = 6
HALF_A_CHARACTER = "\ufffd"


def user(text):
    return {"role": "user", "content": text}


@dataclass
class Job:
    """A target that answers chats."""

    root: Path

    def __post_init__(self):
        self.config, params = load_target(str(self.root / "target"), "float32")
        self.tokenizer = load_tokenizer(str(self.root / "target"))
        self.decoder = Decoder(self.config, params)
        self.chats = [messages for _, messages in read_chats(self.root / "train.jsonl")][:10]
        self.chats[0] = [*self.chats[0], user("again"), {"role": "assistant", "content": "no"}]
        self.chats[1] = [user("alpha " * 200), {"role": "assistant", "content": "no"}]

    def run(self, output, chats=None, batch_size=4, enable_thinking=False) -> ResponseCounts:
        settings = ResponseSettings(MAX_NEW, 64, batch_size, SamplingConfig(1.0, seed=5), enable_thinking)
        monitor = RunMonitor(None, None)
        return regenerate(self.decoder, self.tokenizer, STOP_IDS, chats or self.chats, Path(output), settings, monitor)


@pytest.fixture(scope="module")
def job(material):
    return Job(material)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The responses of a job that nothing interrupted, and their counts."""
    path = tmp_path_factory.mktemp("whole") / "responses.jsonl"
    return path, job.run(path)


def test_responses_are_the_targets_own(job, whole):
    rows = {row["row"]: row["messages"] for row in read_rows(whole[0])}
    assert 1 not in rows, "its prompt is too long"
    reasons = []
    for number, messages in rows.items():
        for i in range(1, len(messages), 2):
            prompt = encode_prompt(job.tokenizer, messages[:i], False)
            sampling = SamplingConfig(1.0, seed=5 + number)
            (alone,) = job.decoder.generate([prompt], MAX_NEW, sampling, STOP_IDS)
            ids = [t for t in alone.output_ids if t not in STOP_IDS]
            assert messages[i] == {
                "role": "assistant",
                "content": job.tokenizer.decode(ids).rstrip(HALF_A_CHARACTER * (alone.finish_reason == "length")),
                "finish_reason": alone.finish_reason,
            }
            reasons.append(alone.finish_reason)
    assert set(reasons) == {"stop", "length"}
    assert whole[1] == ResponseCounts(len(rows), len(job.chats) - len(rows), reasons.count("length"))


def test_the_end_of_a_cut_answer_is_not_learned(job, whole):
    end = job.tokenizer.eos_token_id
    for (_, messages), row in zip(read_chats(whole[0]), read_rows(whole[0]), strict=True):
        ids, mask = render_chat(job.tokenizer, messages, False)
        ends = [m for i, m in zip(ids, mask, strict=True) if i == end][1::2]
        assert ends == [int(turn["finish_reason"] == "stop") for turn in row["messages"][1::2]]


def interrupt_after(monkeypatch, num_batches, number=signal.SIGTERM):
    generate, calls = Decoder.generate, []

    def generate_and_stop(self, *arguments, **keywords):
        calls.append(None)
        if len(calls) == num_batches:
            os.kill(os.getpid(), number)
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(Decoder, "generate", generate_and_stop)


def test_a_stopped_job_goes_on_to_the_same_bytes(job, whole, tmp_path, monkeypatch):
    path = tmp_path / "responses.jsonl"
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(RunStopped, match=r"stopped after 4 of 10 chats; .*responses\.jsonl keeps \d rows"):
            job.run(path)
    assert whole[0].read_bytes().startswith(path.read_bytes()) and path.stat().st_size > 0
    with path.open("a") as file:
        file.write('{"messages": [{"role"')  # cut by a crash
    assert job.run(path) == whole[1]
    assert path.read_bytes() == whole[0].read_bytes()


def test_the_rate_is_shown(job, tmp_path, capsys, monkeypatch):
    clock = iter((10.0, 12.0, 15.0))
    monkeypatch.setattr(responses_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(monitor_module, "_SECONDS_BETWEEN_LINES", 0.0)
    script_answers(monkeypatch, job, ("one", "stop"), ("two", "length"), ("", "stop"))
    lengths = [len(job.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("one", "two")]
    job.run(tmp_path / "r.jsonl", [[user("a")], [user("b")], [user("c")]], batch_size=2)
    first = lengths[0] + lengths[1] + 1
    said = capsys.readouterr().out
    assert f"responses: 2/3  tokens/s {first / 2:.3g}  left out 0" in said
    assert f"responses: 3/3  tokens/s {(first + 1) / 5:.3g}  left out 1" in said


def test_a_job_that_died_inside_a_batch_goes_on_with_the_same_batches(job, whole, tmp_path, monkeypatch):
    lines = whole[0].read_text().splitlines(keepends=True)
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(lines[:1]))
    seen, generate = [], Decoder.generate

    def generate_and_note(self, prompts, *arguments, **keywords):
        seen.append(prompts)
        return generate(self, prompts, *arguments, **keywords)

    monkeypatch.setattr(Decoder, "generate", generate_and_note)
    assert job.run(path) == whole[1]
    assert path.read_text() == "".join(lines)
    first_batch = [encode_prompt(job.tokenizer, job.chats[i][:1], False) for i in (0, 2, 3)]
    assert seen[0] == first_batch, "as it was, not a new one that begins after the rows that are there"


def script_answers(monkeypatch, job, *answers):
    """Let the decoder give these (text, finish reason), one after the other."""
    left = list(answers)

    def generate(self, prompts, *arguments, **keywords):
        found = []
        for prompt in prompts:
            text, reason = left.pop(0)
            ids = job.tokenizer(text, add_special_tokens=False)["input_ids"] + [STOP_IDS[0]] * (reason == "stop")
            found.append(Generation(list(prompt), ids, ["target"] * len(ids), reason))
        return found

    monkeypatch.setattr(Decoder, "generate", generate)


def test_an_answer_that_cannot_be_learned_ends_its_chat(job, tmp_path, monkeypatch):
    two_turns = [user("a"), user("b")]
    script_answers(monkeypatch, job, ("one", "length"), (" \n", "stop"), ("é", "length"), ("", "length"))
    counts = job.run(tmp_path / "r.jsonl", [two_turns, [user("c")], [user("d")]], batch_size=1)
    assert counts == ResponseCounts(num_answered=2, num_left_out=1, num_cut=2)
    rows = read_rows(tmp_path / "r.jsonl")
    assert [[m["content"] for m in row["messages"]] for row in rows] == [["a", "one"], ["c", "é"]]
    assert "2 chats answered (2 answers cut by their token budget), 1 left out" in counts.summary()


def test_half_a_character_at_the_cut_is_dropped(job, tmp_path, monkeypatch):
    (half, *_) = job.tokenizer("é", add_special_tokens=False)["input_ids"]
    ids = [*job.tokenizer("caf", add_special_tokens=False)["input_ids"], half]
    monkeypatch.setattr(
        Decoder, "generate", lambda self, prompts, *_, **__: [Generation(prompts[0], ids, ["target"] * 4, "length")]
    )
    job.run(tmp_path / "r.jsonl", [[user("a")]])
    assert read_rows(tmp_path / "r.jsonl")[0]["messages"][1]["content"] == "caf"


def test_an_answer_cut_inside_its_thought_is_left_out(job, tmp_path, monkeypatch):
    """A template that puts an empty thought before an answer without one, as Qwen3's does."""
    monkeypatch.setattr(
        job.tokenizer,
        "chat_template",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ('' if '</think>' in m.content else '<think></think>') + m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    script_answers(monkeypatch, job, ("<think>hm", "length"), ("<think>hm</think>one", "length"))
    counts = job.run(tmp_path / "r.jsonl", [[user("a")], [user("b")]], enable_thinking=True)
    assert counts == ResponseCounts(num_answered=1, num_left_out=1, num_cut=1)
    assert [row["row"] for row in read_rows(tmp_path / "r.jsonl")] == [1]


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("regenerate", repository / "scripts" / "regenerate_responses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(script, material, tmp_path):
    """Run the command on the material, with these options changed or added; return its exit status."""

    def run(**changed):
        options = {
            "target": material / "target",
            "input": material / "train.jsonl",
            "output": tmp_path / "answers.jsonl",
            "max-new-tokens": MAX_NEW,
            "batch-size": 4,
            "limit": 10,
            "temperature": 1.0,
        } | {name.replace("_", "-"): value for name, value in changed.items()}
        arguments = script.parse_arguments([f"--{name}={value}" for name, value in options.items()])
        return explain_or_raise(lambda: script.run(arguments))

    return run


def test_the_command_takes_prompts_without_answers(material, repository, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "say alpha"}]}\nnot json\n')

    def call(source):
        command = f"scripts/regenerate_responses.py --max-new-tokens 4 --batch-size 2 --temperature 1 --output {output}"
        environment = os.environ | {"PYTHONPATH": str(repository)}
        arguments = [sys.executable, *command.split(), "--target", material / "target", "--input", source]
        return subprocess.run(arguments, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    done = call(prompts)
    assert done.returncode == 0, done.stderr
    log = tmp_path / "answers.jsonl.bad_rows.jsonl"
    assert "1 skipped (1 x malformed JSON)" in done.stdout and str(log) in done.stdout
    assert [row["line"] for row in read_rows(log)] == [2]
    assert f"{material / 'target'} in float32" in done.stdout
    assert "1 chats answered (1 answers cut by their token budget), 0 left out" in done.stdout
    (answered,) = read_rows(output)
    assert [m["role"] for m in answered["messages"]] == ["user", "assistant"]
    missing = call(tmp_path / "absent.jsonl")
    assert missing.returncode == EXIT_MISTAKE and "absent.jsonl cannot be read" in missing.stderr


def test_an_interrupted_command_keeps_its_answers_and_counts_them_right(call, tmp_path, capsys, monkeypatch):
    assert call(output=tmp_path / "whole.jsonl") == 0
    final = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2, signal.SIGINT)
        assert call() == EXIT_STOPPED
    said = capsys.readouterr().err
    assert said.startswith("stopped after 8 of 10 chats") and len(said.splitlines()) == 1
    assert call(batch_size=3) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'answers.jsonl'}: {final}"
    rows = read_rows(tmp_path / "answers.jsonl")
    assert rows == read_rows(tmp_path / "whole.jsonl")
    assert final.startswith(f"{len(rows)} chats answered") and f", {10 - len(rows)} left out" in final


def test_answers_of_another_job_are_not_mixed_in(call, job, material, tmp_path, capsys):
    assert call() == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    shutil.copytree(material / "target", tmp_path / "other")
    params = jax.tree.map(lambda leaf: leaf * 2, job.decoder.params.target)
    save_target(tmp_path / "other", job.config, params)
    shutil.copyfile(material / "eval.jsonl", tmp_path / "other.jsonl")
    assert call(target=tmp_path / "other", temperature=0.5, seed=3, max_new_tokens=7, dtype="bfloat16") == EXIT_MISTAKE
    said = capsys.readouterr().err
    for expected in (
        "target.weights: stored",
        "sampling.temperature: stored 1.0, now 0.5",
        "sampling.seed: stored 0, now 3",
        "max_new_tokens: stored 6, now 7",
        "dtype: stored 'float32', now 'bfloat16'",
    ):
        assert expected in said
    assert call(input=tmp_path / "other.jsonl") == EXIT_MISTAKE
    said = capsys.readouterr().err
    assert "input: stored" in said and "prompts: stored" in said and "num_prompts: stored 10, now 4" in said
    assert call(limit=11) == EXIT_MISTAKE
    assert "num_prompts: stored 10, now 11" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_a_target_that_was_moved_is_the_same(call, material, tmp_path):
    shutil.copytree(material / "target", tmp_path / "before")
    assert call(target=tmp_path / "before") == 0
    (tmp_path / "before").rename(tmp_path / "moved")
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert call(target=tmp_path / "moved") == 0
    settings = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())
    assert settings["target"]["path"] == str(tmp_path / "moved") and settings["target"]["kind"] == "directory"
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target=t", "--concurrency=2"], "--concurrency has no meaning without --endpoint"),
        (["--target=t", "--model=m"], "--model has no meaning without --endpoint"),
        (["--endpoint=http://h", "--batch-size=2"], "--batch-size has no meaning with --endpoint"),
        (["--endpoint=http://h", "--max-prompt-tokens=2"], "--max-prompt-tokens needs a tokenizer"),
        ([], "give --target DIR_OR_ID, or --endpoint URL"),
    ],
)
def test_no_option_is_silently_ignored(script, capsys, options, said):
    with pytest.raises(SystemExit) as caught:
        script.parse_arguments(["--input=i", "--output=o", *options])
    assert caught.value.code == EXIT_MISTAKE and said in capsys.readouterr().err


def test_rows_that_nothing_is_known_about_are_not_added_to(call, tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"messages": [user("a")], "row": 0}) + "\n")
    assert call() == EXIT_MISTAKE
    assert "answers.jsonl.settings.json is missing" in capsys.readouterr().err


def test_an_output_is_written_to_by_one_process_at_a_time(call, tmp_path, capsys, monkeypatch):
    output = tmp_path / "answers.jsonl"
    log = tmp_path / "answers.jsonl.bad_rows.jsonl"
    log.write_text("of the other\n")
    with hold_output(output):
        assert call() == EXIT_MISTAKE
        said = capsys.readouterr().err
        assert said.startswith(f"error: {output} is being written to by process {os.getpid()} on ")
        assert len(said.splitlines()) == 1 and ".answers.jsonl.lock" in said
        assert log.read_text() == "of the other\n" and not output.exists()
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "fcntl", None)  # as on Windows
            with hold_output(output):
                pass
    assert call() == 0


@pytest.mark.parametrize("suffix", ["", ".settings.json", ".bad_rows.jsonl"])
def test_the_input_is_never_written_to(call, material, tmp_path, capsys, suffix):
    source = tmp_path / f"answers.jsonl{suffix}"
    shutil.copyfile(material / "train.jsonl", source)
    assert call(input=source) == EXIT_MISTAKE
    assert "is a file that would be written to; give another --output" in capsys.readouterr().err
    assert source.read_bytes() == (material / "train.jsonl").read_bytes()


@pytest.mark.parametrize("option", ["batch-size", "limit", "max-new-tokens", "max-prompt-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_counts_are_positive(call, capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        call(**{option: value})
    assert caught.value.code == EXIT_MISTAKE
    assert f"--{option}: '{value}' is not a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "chosen"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_the_type_is_the_stored_one(script, job, tmp_path, stored, chosen):
    save_target(tmp_path, job.config, job.decoder.params.target, stored)
    assert script.choose_dtype(tmp_path) == chosen
