import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from domino_jax.checkpoints.huggingface import load_draft, load_target, save_draft, save_target
from domino_jax.config import ConfigError, SamplingConfig
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
from domino_jax.decoding.draft_vocabulary import limit_vocabulary, save_draft_vocabulary
from domino_jax.decoding.state import ModelParams
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.ops import cpu_kernels
from domino_jax.runs import server
from domino_jax.runs.folder import RunError
from domino_jax.serving.engine import SlotEngine
from domino_jax.serving.engine_config import EngineConfig
from domino_jax.serving.memory_plan import plan_memory
from domino_jax.sharding import count_device_bytes
from tests.decoding.tiny_pair import draw_params, make_configs
from tests.serving.http.conftest import start_servers


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(a, b): return a + b", "héllo wörld"] * 5, 300)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tokenizer):
    """A finished run with a pair of random weights: `runs/small/{target,draft}`."""
    root = tmp_path_factory.mktemp("cwd") / "runs" / "small"
    target, draft = make_configs(vocab=len(tokenizer), context=256, mask_id=3)
    root.mkdir(parents=True)
    target_params = draw_params(init_target_params, target, 0)
    tied = {k: v for k, v in target_params.items() if k != "lm_head"} if target.tie_word_embeddings else target_params
    save_target(str(root / "target"), target, tied, extra_config={"eos_token_id": tokenizer.eos_token_id})
    save_tokenizer(tokenizer, root / "target")
    save_draft(str(root / "draft"), draft, draw_params(init_draft_params, draft, 1))
    (root / "report").mkdir()
    (root / "report" / "report.md").write_text("done")
    return root


def test_the_newest_finished_run_is_found(run_folder, tmp_path):
    runs = run_folder.parent
    assert server.find_newest_pair(runs) == (str(run_folder / "target"), str(run_folder / "draft"))
    for part in ("target", "draft"):
        shutil.copytree(run_folder / part, runs / "unfinished" / part)
    assert server.find_newest_pair(runs)[0] == str(run_folder / "target")
    with pytest.raises(RunError, match=r"no finished run in .*python train.py --config configs/tiny.py"):
        server.find_newest_pair(tmp_path / "runs")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, SamplingConfig(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, SamplingConfig(0.6, 20, 0.95)),
        ({"do_sample": False, "temperature": 0.6}, SamplingConfig()),
        ({"eos_token_id": 3}, SamplingConfig(temperature=1.0)),
    ],
)
def test_a_targets_own_sampling_is_the_default(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert server.read_default_sampling(tmp_path) == expected


def test_unusable_default_sampling_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(ConfigError, match=r"generation_config.json: temperature is -1"):
        server.read_default_sampling(tmp_path)


def test_the_codec_renders_chats_as_training_does(tokenizer, run_folder):
    from domino_jax.data.chat_template import encode_prompt

    codec = server.make_codec(tokenizer, str(run_folder / "target"))
    messages = [{"role": "user", "content": "add(a, b) wörld"}]
    assert codec.encode_chat(messages, {}) == encode_prompt(tokenizer, messages, enable_thinking=False)
    assert codec.stop_ids == (tokenizer.eos_token_id,)
    assert codec.decode(codec.encode_text("héllo <|im_end|>"), skip_special_tokens=True) == "héllo "
    injected = codec.encode_chat([{"role": "user", "content": "héllo <|im_end|>"}], {})
    assert injected.count(tokenizer.eos_token_id) == 1


def test_slots_are_as_many_as_fit(monkeypatch):
    target, draft = make_configs(context=4096)
    options = server.ServerOptions("unused", engine=EngineConfig(prefix_cache_tokens=0))
    _, plan = server.size_engine(options, target, draft)
    monkeypatch.setattr(server, "find_memory_limit", lambda *_: plan.total_bytes // 3)
    config, smaller = server.size_engine(options, target, draft)
    assert config.max_slots == 4
    assert smaller.total_bytes <= plan.total_bytes // 3
    asked = server.ServerOptions("unused", max_slots=32, engine=EngineConfig(prefix_cache_tokens=0))
    with pytest.raises(ConfigError, match=r"(?s)may use .*--max-slots 4 would fit"):
        server.size_engine(asked, target, draft)
    monkeypatch.setattr(server, "find_memory_limit", lambda *_: smaller.total_bytes // 4)
    with pytest.raises(ConfigError, match=r"--max-model-len (512|1024|2048) would fit with 1 slots"):
        server.size_engine(options, target, draft)
    monkeypatch.setattr(server, "find_memory_limit", lambda *_: 1000)
    with pytest.raises(ConfigError, match="not even one short sequence fits"):
        server.size_engine(options, target, draft)


@pytest.mark.parametrize("head", [{}, {"gru_hidden_dim": 0, "emb_dim": 0}], ids=["head", "no head"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_of_a_draft_vocabulary_are_counted(tmp_path, is_tied, head):
    target, draft = make_configs(**head)
    target = replace(target, tie_word_embeddings=is_tied)
    save_draft_vocabulary(tmp_path / "vocabulary.json", target.vocab_size, np.arange(0, 48, 3))
    options = server.ServerOptions("unused", draft_vocabulary=tmp_path / "vocabulary.json")
    options, vocabulary = server.read_vocabulary(options, target, draft)
    params = ModelParams(draw_params(init_target_params, target, 0), draw_params(init_draft_params, draft, 1))
    params = limit_vocabulary(params, vocabulary)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((params.draft, params.vocabulary)))
    assert dict(server.size_engine(options, target, draft)[1].parts)["drafter's weights"] == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("draft_weights", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_plan_counts_the_weights_that_are_held(tmp_path, run_folder, monkeypatch, stored, draft_weights, dtype):
    for name, load, save in (("target", load_target, save_target), ("draft", load_draft, save_draft)):
        loaded = load(str(run_folder / name), "float32")
        config, params = (loaded.config, loaded.params) if name == "draft" else loaded
        shutil.copytree(run_folder / name, tmp_path / name)
        save(tmp_path / name, config, params, dtype=stored)
    seen = {}
    monkeypatch.setattr(server, "run_server", lambda *_: 0)
    monkeypatch.setattr(server, "create_app", lambda *_: None)
    monkeypatch.setattr(server, "SlotEngine", lambda target, draft, load, *_: seen.update(params=load()))
    monkeypatch.setattr(server, "plan_memory", lambda *args: seen.update(counted=args[2:4]) or plan_memory(*args))
    options = server.ServerOptions(str(tmp_path / "target"), str(tmp_path / "draft"), max_slots=1, dtype=dtype)
    assert server.serve(replace(options, draft_weights=draft_weights)) == 0
    params = seen["params"]
    assert seen["counted"] == (count_device_bytes(params.target), count_device_bytes((params.draft, params.vocabulary)))
    has_kernels = cpu_kernels.has_kernels_for(dtype)
    is_narrow = dtype == "bfloat16" or (stored == "bfloat16" and has_kernels)
    assert params.weight_types["target_weights"] == ("bfloat16" if is_narrow else "float32")
    assert (params.vocabulary is not None) == (has_kernels and stored == "float32" and draft_weights == "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve: no finished run"),
        (["--draft", "x"], "--draft needs --target"),
        (["--config", "c.py", "--target", "x"], "not both"),
        (["--target", "./nowhere"], "is not a directory"),
        (["--target", "TARGET", "--max-model-len", "100000"], "context holds 256"),
        (["--target", "TARGET", "--draft", "DRAFT", "--block-size", "9"], "outside 1 .. 5"),
        (["--target", "TARGET", "--memory-fraction", "0.0000001"], "may use"),
        (["--target", "TARGET", "--memory-fraction", "nan"], "memory_fraction is nan"),
        (["--target", "TARGET", "--max-slots", "0"], "max_slots is 0"),
        (["--target", "TARGET", "--max-connections", "0"], "max_connections is 0"),
        (["--target", "TARGET", "--draft", "DRAFT", "--block-size", "0"], "outside 1 .. 5"),
        (["--target", "TARGET", "--max-slots", "4", "--batch-sizes", "8"], "batch_sizes has 8"),
        (["--target", "TARGET", "--compilation-cache", "FILE"], "not a directory that can be written"),
        (["--target", "TARGET", "--block-sizes", "4,x"], "not a list of numbers"),
        (
            ["--target", "TARGET", "--draft", "DRAFT", "--draft-vocabulary", "none.json"],
            "no draft vocabulary at none.json",
        ),
        (["--target", "TARGET", "--draft-vocabulary", "VOCABULARY"], "is given but no drafter"),
        (["--target", "TARGET", "--draft-weights", "bfloat16"], "--draft-weights bfloat16 is given but no drafter"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(
    repository, run_folder, tokenizer, tmp_path, monkeypatch, capsys, arguments, message
):
    sys.path.insert(0, str(repository))
    try:
        import serve
    finally:
        sys.path.remove(str(repository))
    (tmp_path / "file").write_text("")
    save_draft_vocabulary(tmp_path / "vocabulary.json", len(tokenizer), np.arange(9))
    places = {"TARGET": run_folder / "target", "DRAFT": run_folder / "draft", "FILE": tmp_path / "file"}
    places["VOCABULARY"] = tmp_path / "vocabulary.json"
    monkeypatch.chdir(tmp_path)
    cache = [] if "--compilation-cache" in arguments else ["--compilation-cache", "none"]
    try:
        status = serve.main([str(places.get(a, a)) for a in arguments] + cache)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_extra_is_named(repository, run_folder, tmp_path):
    program = f"""
import sys
sys.modules["uvicorn"] = None
sys.path.insert(0, {str(repository)!r})
import serve
sys.exit(serve.main(["--target", {str(run_folder / "target")!r}, "--compilation-cache", "none"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == 'error: serving needs uvicorn; install it with pip install -e ".[serve]"'


SAMPLINGS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 12},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.1, "presence_penalty": 0.6, "frequency_penalty": 0.3, "n": 2},
]


def draw_bodies(num_bodies, seed):
    """Return paths and bodies of requests; every sampling comes, with chats and completions, and stops of all kinds."""
    generator, bodies = np.random.default_rng(seed), []
    for i in range(num_bodies):
        words = " ".join(generator.choice(["add", "return", "def", "a + b", "wörld"], int(generator.integers(2, 20))))
        body = {**SAMPLINGS[i % len(SAMPLINGS)], "seed": int(generator.integers(2**31))}
        body |= {"max_tokens": int(generator.integers(8, 80)), "skip_special_tokens": False}
        if i % 2:
            bodies.append(("/v1/completions", body | {"prompt": words, "stop": ["ed", "7"]}))
        else:
            messages = [{"role": "user", "content": words}]
            stop_ids = generator.integers(4, 290, 8).tolist()
            bodies.append(("/v1/chat/completions", body | {"messages": messages, "stop_token_ids": stop_ids}))
    return bodies


def ask(running, path, body, streams):
    """Return texts and finish reasons by choice, and the usage."""
    if not streams:
        answer = running.client.post(path, json=body, timeout=120).json()
        choices = [(c.get("text") or c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]
    else:
        events = running.stream(path, {**body, "stream_options": {"include_usage": True}})
        answer, choices = events[-1], []
        for index in range(body.get("n", 1)):
            parts = [c for event in events for c in event["choices"] if c["index"] == index]
            text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in parts)
            choices.append((text, parts[-1]["finish_reason"]))
    return choices, {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


@pytest.mark.slow
def test_sampled_answers_over_http_are_the_same_alone_and_among_others(run_folder, tokenizer):
    target, draft = make_configs(vocab=len(tokenizer), context=256, mask_id=3)
    params = ModelParams(draw_params(init_target_params, target, 0), draw_params(init_draft_params, draft, 1))
    engine = SlotEngine(target, draft, lambda: params, EngineConfig(max_slots=20, batch_sizes=(1,)))
    codec = server.make_codec(tokenizer, str(run_folder / "target"))
    bodies, others = draw_bodies(12, seed=1), draw_bodies(18, seed=2)
    with start_servers() as start, ThreadPoolExecutor(len(bodies) + len(others)) as threads:
        running = start(engine, codec)
        ends_s = time.monotonic() + 300
        while running.client.get("/ready").status_code != 200:
            assert time.monotonic() < ends_s, engine.status()
            time.sleep(0.1)
        alone = [ask(running, path, body, streams=i % 3 == 0) for i, (path, body) in enumerate(bodies)]
        crowd = [
            threads.submit(ask, running, path, body | {"use_draft": i % 3 > 0}, i % 2)
            for i, (path, body) in enumerate(others)
        ]
        together = [threads.submit(ask, running, path, body, i % 2 == 0) for i, (path, body) in enumerate(bodies)]
        most_running = 0
        while not all(answer.done() for answer in together):
            most_running = max(most_running, engine.status().num_running)
            time.sleep(0.005)
        assert most_running == 20
        assert [answer.result() for answer in together] == alone
        assert all(answer.result() for answer in crowd)
        assert running.metric("domino_jit_compiles_total", phase="serving") == 0
    reasons = {reason for choices, _ in alone for _, reason in choices}
    assert reasons == {"stop", "length"}
    texts = [text for choices, _ in alone for text, _ in choices]
    assert len(set(texts)) == len(texts)


class ServerProcess:
    """serve.py in a process of its own, on a free port."""

    def __init__(self, repository, cwd, *arguments, num_devices=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, str(repository / "serve.py"), "--port", self.url.rsplit(":", 1)[1], *arguments]
        env = {**os.environ, "PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, ""

    def stream(self, path, body):
        """Yield the events of a streamed answer as they come; the last must be the end."""
        data = json.dumps(body | {"stream": True}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            lines = (line.decode().removeprefix("data: ").strip() for line in answer if line.strip())
            for line in lines:
                if line == "[DONE]":
                    return
                yield json.loads(line)
        raise AssertionError("the stream ended without [DONE]")

    def wait_until_ready(self):
        seen, pause = [], threading.Event()
        for _ in range(1200):
            assert self.process.poll() is None, self.process.stdout.read()
            status, text = self.get("/ready")
            if status == 200:
                return seen
            seen.append(text)
            pause.wait(0.25)
        raise TimeoutError(seen[-1])


@pytest.mark.slow
def test_serve_answers_as_the_decoder_does_and_starts_faster_the_second_time(repository, run_folder, tmp_path):
    from domino_jax.decoding.generate import Decoder

    arguments = ("--max-slots", "2", "--batch-sizes", "2", "--compilation-cache", str(tmp_path / "xla"))
    began = time.monotonic()
    server_ = ServerProcess(repository, run_folder.parents[1], *arguments)
    try:
        seen = server_.wait_until_ready()
        first_start_s = time.monotonic() - began
        assert any("compiled" in text for text in seen)
        prompt_ids = np.random.default_rng(0).integers(4, 290, 20).tolist()
        body = {"prompt": prompt_ids, "temperature": 0, "max_tokens": 40, "return_metrics": True}
        body |= {"skip_special_tokens": False}
        status, text = server_.get("/v1/completions", body)
        assert status == 200, text
        answer = json.loads(text)
        assert answer["model"] == "small"
        target, params = load_target(str(run_folder / "target"), "float32")
        draft = load_draft(str(run_folder / "draft"), "float32")
        decoder = Decoder(target, params, draft.config, draft.params)
        [wanted] = decoder.generate([prompt_ids], 40, stop_ids=(2,))
        written = [token for token in wanted.output_ids if token != 2]
        assert answer["choices"][0]["text"] == json.loads(server_.get("/detokenize", {"tokens": written})[1])["prompt"]
        assert answer["usage"]["completion_tokens"] == len(wanted.output_ids)
        num_drafts = answer["metrics"]["speculative_decoding"]["num_drafts"]
        assert num_drafts <= len(wanted.output_ids)
        assert 'domino_jit_compiles_total{phase="serving"} 0.0' in server_.get("/metrics")[1]
        assert server_.get("/v1/chat/completions", {"messages": []})[0] == 400
    finally:
        server_.process.send_signal(signal.SIGTERM)
        output = server_.process.communicate(timeout=120)[0]
    assert server_.process.returncode == 0, output
    assert "in all" in output
    began = time.monotonic()
    again = ServerProcess(repository, run_folder.parents[1], *arguments)
    again.wait_until_ready()
    assert time.monotonic() - began < first_start_s
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(timeout=120) == 0
    again.process.stdout.close()


@pytest.mark.slow
def test_serve_without_weights_ends_with_a_fault(repository, run_folder, tmp_path):
    broken = tmp_path / "target"
    shutil.copytree(run_folder / "target", broken)
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    server_ = ServerProcess(repository, tmp_path, "--target", str(broken), "--compilation-cache", "none")
    output = server_.process.communicate(timeout=120)[0]
    assert server_.process.returncode != 0
    assert "model.safetensors" in output


@pytest.fixture(scope="module")
def split_pair(tmp_path_factory, tokenizer):
    """Directories of a pair of random weights whose heads two devices can share."""
    root = tmp_path_factory.mktemp("split")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
    target, draft = make_configs(vocab=len(tokenizer), context=256, mask_id=3, sizes=sizes)
    target_params = draw_params(init_target_params, target, 0)
    save_target(str(root / "target"), target, target_params, extra_config={"eos_token_id": tokenizer.eos_token_id})
    save_tokenizer(tokenizer, root / "target")
    save_draft(str(root / "draft"), draft, draw_params(init_draft_params, draft, 1))
    return ["--target", str(root / "target"), "--draft", str(root / "draft")]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=2", "model=2"])
def test_a_server_on_a_mesh_answers_as_one_without_and_lets_streams_end(
    repository, split_pair, tmp_path_factory, tmp_path, mesh
):
    settings = ["--max-slots", "2", "--batch-sizes", "2", "--compilation-cache", "none"]
    num_devices = 2 if mesh == "model=2" else 4
    meshed = ServerProcess(repository, tmp_path, *split_pair, *settings, "--mesh", mesh, num_devices=num_devices)
    plain = ServerProcess(repository, tmp_path, *split_pair, *settings)
    paths_and_bodies = [
        (path, body | {"max_tokens": 40, "n": 1} | ({"temperature": 0} if i < 4 else {}))
        for i, (path, body) in enumerate(draw_bodies(6, seed=3))
    ]
    try:
        for server_ in (plain, meshed):
            server_.wait_until_ready()
        answers = [[server_.get(path, body) for path, body in paths_and_bodies] for server_ in (plain, meshed)]
        ours, theirs = (
            [(json.loads(text)["choices"], json.loads(text)["usage"]) for status, text in of_one] for of_one in answers
        )
        assert theirs == ours
        assert all(status == 200 for of_one in answers for status, _ in of_one)
        path, body = "/v1/completions", {"prompt": "add(a, b)", "temperature": 0, "max_tokens": 200, "ignore_eos": True}
        whole = json.loads(plain.get(path, body)[1])["choices"][0]["text"]
        stream = meshed.stream(path, body)
        parts = [next(stream)["choices"][0]["text"]]
        meshed.process.send_signal(signal.SIGTERM)  # while the answer is under way
        parts += [choice["text"] for event in stream for choice in event["choices"]]
        assert "".join(parts) == whole and len([part for part in parts if part]) > 5
        outputs = [meshed.process.communicate(timeout=120)[0]]
        plain.process.send_signal(signal.SIGTERM)
        outputs.append(plain.process.communicate(timeout=120)[0])
    finally:
        for server_ in (meshed, plain):
            server_.process.kill()
            server_.process.wait()
            server_.process.stdout.close()
    assert [meshed.process.returncode, plain.process.returncode] == [0, 0], outputs
