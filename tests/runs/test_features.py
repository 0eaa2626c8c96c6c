"""The stage that fills a feature cache, and trainings that read from it."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from domino_jax.config import ConfigError
from domino_jax.data import feature_cache as feature_cache_module
from domino_jax.data.feature_cache import FeatureCache, FeatureCacheError, read_index
from domino_jax.data.pipeline import ChatSource
from domino_jax.durable import format_bytes
from domino_jax.run_config import DataConfig, DraftSettings, ObjectiveConfig, RunConfig, TargetSource, TrainConfig
from domino_jax.runs import draft as draft_module
from domino_jax.runs import features as features_module
from domino_jax.runs.draft import resolve_draft, train_draft
from domino_jax.runs.errors import EXIT_MISTAKE, RunStopped
from domino_jax.runs.features import choose_widths, open_features
from domino_jax.runs.folder import RunError, open_run
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.training_run import cache_features, load_target_model

NUM_STEPS, NUM_SHARDS = 20, 5
SHARD_BYTES = 25_000
LAYERS = (0, 2)
Usage = namedtuple("Usage", "total used free")


def make_config(material, output_dir, cache="", match="none", **data) -> RunConfig:
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4, target_layer_ids=LAYERS),
        data=DataConfig(
            **(
                {
                    "train_path": str(material / "train.jsonl"),
                    "max_length": 48,
                    "batch_size": 4,
                    "micro_steps": 2,
                    "feature_cache": str(cache),
                }
                | data
            )
        ),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2, match=match),
        train=TrainConfig(num_steps=NUM_STEPS, log_every=1, checkpoint_every=5, eval_every=NUM_STEPS),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Let trainings of this file share their compiled steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(draft_module, "make_train_step", functools.cache(draft_module.make_train_step))
        patched.setattr(features_module, "make_feature_step", functools.cache(features_module.make_feature_step))
        yield


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache_module, "SHARD_BYTES", SHARD_BYTES)


def train(config, say=None):
    """Train the drafter alone, without held-out prompts and report; return rows without the clock, and weights."""
    folder = open_run(config)
    monitor = RunMonitor(folder.metrics, None)
    if say is not None:
        monitor.say = say
    train_draft(config, folder, load_target_model(config, folder), config.data.train_path, "", monitor)
    rows = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_rows(folder.metrics)]
    return rows, load_file(folder.latest_draft / "model.safetensors")


def open_cache(config, verify=False):
    """Fill the cache; return its source and what was said."""
    folder = open_run(config)
    monitor, said = RunMonitor(None, None), []
    monitor.say = said.append
    target = load_target_model(config, folder)
    chats = ChatSource(config.data.train_path, target.tokenizer, config.data, target.config.vocab_size)
    return open_features(config, resolve_draft(config, target), target, chats, monitor, verify), said


def shard_files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("*.arrayrecord"))}


@pytest.fixture(scope="module")
def filled(material, tmp_path_factory):
    """A whole cache with last hidden states; tests copy it."""
    root = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feature_cache_module, "SHARD_BYTES", SHARD_BYTES)
        open_cache(make_config(material, root, root / "cache", match="kl"))
    assert len(shard_files(root / "cache")) == NUM_SHARDS
    return root / "cache"


@pytest.fixture
def cache(filled, tmp_path):
    return Path(shutil.copytree(filled, tmp_path / "cache"))


@pytest.fixture(scope="module")
def online(material, tmp_path_factory):
    """Rows and weights of training without a cache, by `objective.match`."""

    @functools.cache
    def train_online(match):
        return train(make_config(material, tmp_path_factory.mktemp(match), match=match))

    return train_online


def losses(rows) -> np.ndarray:
    values = np.array([row["loss"] for row in rows if row["stage"] == "draft"])
    assert len(values) == NUM_STEPS
    return values


@pytest.mark.parametrize("match", [pytest.param("none", marks=pytest.mark.slow), "kl"])
def test_losses_from_the_cache_are_those_of_training_online(material, online, tmp_path, match):
    rows, _ = train(make_config(material, tmp_path, tmp_path / "new", match))
    np.testing.assert_allclose(losses(rows), losses(online(match)[0]), rtol=1e-6, atol=0)
    assert losses(rows)[-1] < losses(rows)[0]
    hidden_width = read_index(tmp_path / "new")["identity"]["hidden_width"]
    assert hidden_width == (16 if match == "kl" else 0)


@pytest.mark.slow
def test_a_cache_that_holds_more_serves_as_well(material, online, cache, tmp_path):
    before = shard_files(cache)
    rows, _ = train(make_config(material, tmp_path, cache))
    np.testing.assert_allclose(losses(rows), losses(online("none")[0]), rtol=1e-6, atol=0)
    assert shard_files(cache) == before


def test_a_bfloat16_cache_is_the_rounded_one(material, cache, tmp_path):
    source, _ = open_cache(make_config(material, tmp_path, tmp_path / "half", "kl", feature_dtype="bfloat16"))
    exact, _ = open_cache(make_config(material, tmp_path, cache, "kl"))
    for row in range(len(source)):
        for name in ("features", "last_hidden"):
            wide, narrow = getattr(exact[row], name), getattr(source[row], name)
            assert narrow.dtype.name == "bfloat16"
            # Batches of other shapes: a value between two bfloat16 numbers may fall to the other side.
            np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_a_bfloat16_cache_trains(material, online, tmp_path):
    rows, _ = train(make_config(material, tmp_path, tmp_path / "half", "kl", feature_dtype="bfloat16"))
    np.testing.assert_allclose(losses(rows), losses(online("kl")[0]), rtol=1e-3)
    assert any(losses(rows) != losses(online("kl")[0]))


def test_widths_fit_the_rows():
    data = DataConfig(max_length=3072, feature_cache="x", feature_dtype="bfloat16")
    widths = choose_widths(data)
    assert widths[-1] == 3072 and widths[0] >= 32 and list(widths) == sorted(set(widths)) and len(widths) < 16
    assert all(b / a < 1.5 for a, b in zip(widths, widths[1:], strict=False))
    assert choose_widths(replace(data, feature_dtype="float32")) == (3072,)


def test_the_need_is_said_and_is_what_is_written(material, tmp_path):
    config = make_config(material, tmp_path, tmp_path / "new", "kl")
    source, said = open_cache(config)
    (line,) = [line for line in said if "to write" in line]
    written = sum(map(len, shard_files(tmp_path / "new").values()))
    index = source.index
    assert f"{format_bytes(written)} to write" in line and f"0 of {NUM_SHARDS} shards are there" in line
    assert (
        f"({index.num_tokens} tokens x 32 values + 16 of the last hidden state in float32, 197 bytes a token)" in line
    )
    _, said = open_cache(config)
    assert any(f"{NUM_SHARDS} of {NUM_SHARDS} shards are there, 0 B to write" in line for line in said)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(material, tmp_path, monkeypatch):
    config = make_config(material, tmp_path, tmp_path / "a" / "new", "kl")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 300_000))
    with pytest.raises(FeatureCacheError, match=r"needs 640 KiB more .* 293 KiB free: 347 KiB are lacking") as e:
        open_cache(config)
    for way_out in ("feature_dtype=bfloat16", "data.max_length", "fewer rows", "another directory", "feature_cache="):
        assert way_out in str(e.value)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 700_000))
    open_cache(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 0))
    open_cache(config)  # whole: nothing is needed


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"max_length": 24}, r"max_length: stored 48, now 24"),
        ({"feature_dtype": "bfloat16"}, r"dtype: stored 'float32', now 'bfloat16'"),
        ({"enable_thinking": True}, r"enable_thinking: stored False, now True"),
    ],
)
def test_a_cache_of_other_settings_is_refused(material, cache, tmp_path, changes, difference):
    before = shard_files(cache)
    with pytest.raises(FeatureCacheError, match=rf"(?s)holds features of something else.*{difference}"):
        open_cache(make_config(material, tmp_path, cache, "kl", **changes))
    assert shard_files(cache) == before


def test_a_cache_of_other_rows_layers_or_weights_is_refused(material, cache, tmp_path):
    config = make_config(material, tmp_path, cache, "kl")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((material / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(FeatureCacheError, match=r"(?s)rows: stored '\w+', now '\w+'.*num_rows: stored 20, now 19"):
        open_cache(replace(config, data=replace(config.data, train_path=str(fewer))))
    with pytest.raises(FeatureCacheError, match=r"target_layer_ids: stored \[0, 2\], now \[1, 2\]"):
        open_cache(replace(config, draft=replace(config.draft, target_layer_ids=(1, 2))))
    with pytest.raises(FeatureCacheError, match=r"target\.dtype: stored 'float32', now 'bfloat16'"):
        open_cache(replace(config, target=replace(config.target, dtype="bfloat16")))
    tuned = Path(shutil.copytree(material / "target", tmp_path / "tuned"))
    open_cache(replace(config, target=TargetSource(str(tuned))))  # the same target at another place
    weights = bytearray((tuned / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tuned / "model.safetensors").write_bytes(weights)
    with pytest.raises(FeatureCacheError, match=r"target\.weights: stored '\w+', now '\w+'"):
        open_cache(replace(config, target=TargetSource(str(tuned))))


def test_float32_features_made_on_other_shapes_are_used_and_that_is_said(material, tmp_path):
    config = make_config(material, tmp_path, tmp_path / "new")

    def said_of_shapes(**data):
        _, said = open_cache(replace(config, data=replace(config.data, **data)))
        return [line for line in said if "instead of 1e-6" in line]

    assert said_of_shapes() == said_of_shapes() == []
    (line,) = said_of_shapes(bucket_widths=(32,))
    assert "batches of 2 x 48 tokens, this run would compute them on 2 x 32, 2 x 48: " in line
    (line,) = said_of_shapes(micro_steps=1)
    assert "this run would compute them on 4 x 48: its losses agree" in line
    damage_shard(tmp_path / "new", "deleted")
    assert len(said_of_shapes(micro_steps=1)) == 1  # the others are as they were
    (line,) = said_of_shapes()
    assert "batches of 4 x 48 tokens" in line


def test_shapes_are_not_spoken_of_where_features_are_rounded_anyway(material, tmp_path):
    config = make_config(material, tmp_path, tmp_path / "half", feature_dtype="bfloat16")
    open_cache(config)
    _, said = open_cache(replace(config, data=replace(config.data, micro_steps=1)))
    assert not any("instead of" in line for line in said)


@pytest.mark.slow
def test_losses_from_features_of_other_shapes_agree_to_1e_5(material, online, tmp_path):
    cached = make_config(material, tmp_path, tmp_path / "new", bucket_widths=(24, 32))
    open_cache(cached)
    rows, _ = train(replace(cached, data=replace(cached.data, bucket_widths=())))
    np.testing.assert_allclose(losses(rows), losses(online("none")[0]), rtol=1e-5, atol=0)


def test_a_file_is_no_cache(material, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureCacheError, match=r"data\.feature_cache is '.*file', which is no directory"):
        open_cache(make_config(material, tmp_path, tmp_path / "file"))


def test_settings_that_nothing_would_use_are_refused():
    with pytest.raises(ConfigError, match="feature_dtype is 'bfloat16' while feature_cache is empty"):
        DataConfig(feature_dtype="bfloat16")
    with pytest.raises(ConfigError, match="damaged_shards is 'skip' while feature_cache is empty"):
        DataConfig(damaged_shards="skip")


@pytest.fixture(scope="module")
def command(material, tmp_path_factory):
    """A configuration file of the run, and what calls the script with it."""
    root = tmp_path_factory.mktemp("command")
    fields = make_config(material, root, "", "kl")
    (root / "small.py").write_text(
        f"from domino_jax.run_config import *\n\n\ndef get_config(variant=''):\n    return {fields!r}\n"
    )

    def call(repository, cache, *arguments, prelude=""):
        script = repository / "scripts" / "cache_features.py"
        code = (
            f"import runpy, sys\n{prelude}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        )
        argv = [script, f"--config={root / 'small.py'}", f"--config.data.feature_cache={cache}", *arguments]
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, argv)],
            cwd=repository,
            env=os.environ | {"PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


KILL_IN_THE_THIRD_SHARD = f"""
import os, signal
from domino_jax.data import feature_cache
feature_cache.SHARD_BYTES = {SHARD_BYTES}
encode = feature_cache.FeatureCache._encode
def encode_or_die(self, chat, row):
    if row == self.rows_of(2).start + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, chat, row)
feature_cache.FeatureCache._encode = encode_or_die
"""


def test_a_killed_script_goes_on_to_the_same_bits(command, repository, filled, tmp_path):
    new = tmp_path / "new"
    killed = command(repository, new, prelude=KILL_IN_THE_THIRD_SHARD)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first_two = dict(list(shard_files(filled).items())[:2])
    assert shard_files(new) == first_two and list(new.glob(".*.part"))
    resumed = command(repository, new)
    assert resumed.returncode == 0, resumed.stderr
    assert f"2 of {NUM_SHARDS} shards are there" in resumed.stdout and "tokens/s" in resumed.stdout
    assert "WARNING: nothing says who wrote the answers in" in resumed.stdout
    assert shard_files(new) == shard_files(filled) and not list(new.glob(".*.part"))


@pytest.mark.slow
def test_the_script_tells_a_mistake_in_a_sentence(command, repository, cache):
    refused = command(repository, cache, "--config.data.max_length=24")
    assert refused.returncode == EXIT_MISTAKE and "max_length: stored 48, now 24" in refused.stderr
    assert refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr


def test_a_script_without_a_directory_is_refused(material, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.feature_cache is empty"):
        cache_features(make_config(material, tmp_path))


def test_a_stop_keeps_whole_shards(material, filled, tmp_path, monkeypatch):
    config = make_config(material, tmp_path, tmp_path / "new", "kl")
    write = FeatureCache.write_shard

    def write_and_stop(self, shard, rows):
        write(self, shard, rows)
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureCache, "write_shard", write_and_stop)
        with pytest.raises(RunStopped, match=r"stopped with 2 of 5 shards of features in .*; the same command goes on"):
            open_cache(config)
    assert shard_files(tmp_path / "new") == dict(list(shard_files(filled).items())[:2])
    open_cache(config)
    assert shard_files(tmp_path / "new") == shard_files(filled)


def test_a_stop_inside_a_shard_gives_up_that_shard_alone(material, filled, tmp_path, monkeypatch):
    config = make_config(material, tmp_path, tmp_path / "new", "kl")
    add_features, calls = features_module._FeatureForward._add_features, []

    def add_and_stop(self, *arguments):
        add_features(self, *arguments)
        calls.append(arguments)
        if len(calls) == 3:  # two batches a shard
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(features_module._FeatureForward, "_add_features", add_and_stop)
    with pytest.raises(RunStopped, match=r"stopped with 1 of 5 shards"):
        open_cache(config)
    assert len(calls) == 3
    assert shard_files(tmp_path / "new") == dict(list(shard_files(filled).items())[:1])


def damage_file(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:70_000])
    elif how == "deleted":
        path.unlink()
    else:
        content[len(content) // 8] ^= 4  # inside the records
        path.write_bytes(content)


def damage_shard(cache: Path, how: str, shard: int = 1) -> Path:
    path = sorted(cache.glob("*.arrayrecord"))[shard]
    damage_file(path, how)
    return path


@pytest.mark.parametrize("how", ["truncated", "deleted", "flipped"])
def test_training_computes_a_damaged_shard_again(material, online, filled, cache, tmp_path, how):
    path, said = damage_shard(cache, how), []
    rows, _ = train(make_config(material, tmp_path, cache, "kl"), said.append)
    assert losses(rows).tolist() == pytest.approx(losses(online("kl")[0]).tolist(), rel=1e-6)
    assert shard_files(cache) == shard_files(filled)
    assert sum(path.name in line and "again" in line for line in said) == 1


@pytest.mark.parametrize("how, num_lost", [("truncated", 4), ("deleted", 4), ("flipped", 1)])
def test_or_trains_without_its_rows(material, online, filled, cache, tmp_path, how, num_lost):
    path, said = damage_shard(cache, how), []
    before = shard_files(cache)
    rows, _ = train(make_config(material, tmp_path, cache, "kl", damaged_shards="skip"), said.append)
    assert shard_files(cache) == before
    assert any(path.name in line and "skipped" in line for line in said)
    assert sum(f"{num_lost} of 20 rows are skipped" in line for line in said) == 1
    whole, lacking = (
        np.array([row["num_blocks"] for row in r if row["stage"] == "draft"]) for r in (online("kl")[0], rows)
    )
    assert lacking.sum() < whole.sum() and (lacking <= whole).all()  # the same batches, some without these rows
    assert losses(rows)[-1] < losses(rows)[0]


def test_verify_finds_what_an_open_does_not(material, filled, cache, tmp_path):
    config = make_config(material, tmp_path, cache, "kl")
    path = damage_shard(cache, "flipped")
    _, said = open_cache(config)
    assert not any(path.name in line for line in said) and shard_files(cache) != shard_files(filled)
    _, said = open_cache(config, verify=True)
    assert any(path.name in line and "computed again" in line for line in said)
    assert shard_files(cache) == shard_files(filled)


def test_nothing_left_is_an_error(material, cache, tmp_path):
    for path in cache.glob("*.arrayrecord"):
        path.unlink()
    config = make_config(material, tmp_path, cache, "kl", damaged_shards="skip")
    with pytest.raises(FeatureCacheError, match="every shard is damaged or missing"):
        open_cache(config)


def train_and_stop(config, monkeypatch):
    """Ask for a stop while step 7 is logged."""
    log = RunMonitor.log

    def log_and_stop(self, stage, step, values):
        log(self, stage, step, values)
        if stage == "draft" and step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunMonitor, "log", log_and_stop)
        with pytest.raises(RunStopped, match=r"step [78] of 20"):
            train(config)


@pytest.mark.slow
def test_a_training_from_the_cache_goes_on_to_the_same_bits(material, cache, tmp_path, monkeypatch):
    whole_rows, whole = train(make_config(material, tmp_path / "whole", cache, "kl"))
    config = make_config(material, tmp_path / "stopped", cache, "kl")
    train_and_stop(config, monkeypatch)
    rows, resumed = train(config)
    assert rows == whole_rows
    for name, values in whole.items():
        np.testing.assert_array_equal(values, resumed[name], err_msg=name)


@pytest.mark.slow
def test_a_cache_may_be_moved_and_a_finished_run_needs_none(material, cache, tmp_path, monkeypatch):
    whole_rows, _ = train(make_config(material, tmp_path / "whole", cache, "kl"))
    config = make_config(material, tmp_path / "stopped", cache, "kl")
    train_and_stop(config, monkeypatch)
    with pytest.raises(RunError, match=r"data\.feature_cache: stored 'a directory', now ''"):
        train(replace(config, data=replace(config.data, feature_cache="")))
    moved = cache.rename(tmp_path / "moved")
    config = replace(config, data=replace(config.data, feature_cache=str(moved)))
    assert train(config)[0] == whole_rows
    shutil.rmtree(moved)
    train(config)
    assert not moved.exists()


@pytest.mark.slow
def test_a_finished_run_whose_last_step_is_damaged_trains_from_its_cache(material, tmp_path):
    config = make_config(material, tmp_path, tmp_path / "half", "kl", feature_dtype="bfloat16")
    rows, weights = train(config)
    (tmp_path / "run" / "checkpoints" / str(NUM_STEPS) / "state" / "_METADATA").unlink()
    said = []
    again, restored = train(config, said.append)
    assert f"going on from step {NUM_STEPS - 5}" in said
    assert again == rows
    for name, values in weights.items():
        np.testing.assert_array_equal(values, restored[name], err_msg=name)
