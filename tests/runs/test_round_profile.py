"""`bench.py --profile` on a tiny pair: every phase, counts that are those of the shapes, wrong options named."""

import json
from functools import partial

import jax
import pytest

import bench
from domino_jax.checkpoints.huggingface import save_draft, save_target
from domino_jax.decoding.state import DecodeSettings
from domino_jax.evaluation import anatomy
from domino_jax.evaluation.anatomy import PHASES, count_target_work, count_work
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from tests.decoding.tiny_pair import make_configs

ALL_PHASES = {*PHASES, "plain step", "round", "loop and host", "prefill"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root, (target, draft) = tmp_path_factory.mktemp("pair"), make_configs()
    save_target(root / "target", target, init_target_params(target, jax.random.key(0)))
    save_draft(root / "draft", draft, init_draft_params(draft, jax.random.key(1)))
    return root


@pytest.fixture(autouse=True)
def rates_of_small_copies(monkeypatch):
    """Machine rates are measured, but with a few megabytes: that they are right is not asked here."""
    monkeypatch.setattr(anatomy, "measure_rates", partial(anatomy.measure_rates, copy_bytes=1 << 22, matrix_size=256))


def profile(pair, *options):
    return bench.main(["--target", str(pair / "target"), "--draft", str(pair / "draft"), "--profile", *options])


def test_every_phase_is_measured(pair, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert profile(pair, "--contexts", "16", "40", "--batches", "2", "--output", str(output)) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for context in (16, 40):
        seconds = {row["phase"]: row["seconds"] for row in rows if row["context"] == context}
        assert set(seconds) == ALL_PHASES
        assert all(value > 0 for phase, value in seconds.items() if phase != "loop and host")
        parts = sum(seconds[phase] for phase in (*PHASES, "loop and host"))
        assert parts == pytest.approx(seconds["round"])
    assert {row["batch"] for row in rows} == {2}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "batch 2, context 40: verify takes" in printed and "GFLOP" in printed


def test_without_a_head_its_phase_is_missing(pair, capsys):
    assert profile(pair, "--contexts", "16", "--no-head", "--repeats", "1") == 0
    printed = capsys.readouterr().out
    assert "backbone" in printed and "Domino head" not in printed


def test_counts_of_shapes():
    target, draft = make_configs()
    settings = DecodeSettings(target, draft, draft.block_size)
    layer = 32 * (2 * 32 + 2 * 16 + 3 * 48)
    weights = 2 * layer + 48 * 32
    cached = 2 * 2 * 16 * 10 * 3  # keys and values of two layers, ten positions, three rows
    num_bytes, num_flops = count_target_work(settings, 3, 10, 4)
    assert num_bytes == 4 * (weights + cached) + 4 * 3 * 4 * 48
    assert num_flops == 3 * 4 * (2 * weights + 4 * 2 * 32 * 10)
    work = count_work(settings, 3, 10)
    assert set(work) == {*PHASES, "round"}
    assert work["round"] == tuple(sum(work[phase][i] for phase in PHASES) for i in range(2))
    assert work["LM head"] == (4 * 48 * 32 + 4 * 3 * 5 * 48, 2 * 3 * 5 * 48 * 32)
    limited = count_work(DecodeSettings(target, draft, draft.block_size, num_candidates=4), 3, 10)
    assert limited["Domino head"][0] == work["Domino head"][0] - 4 * 5 * 16 * (48 - 4)
    part = count_work(DecodeSettings(target, draft, draft.block_size, draft_vocab_size=8), 3, 10)
    assert part["LM head"] == (4 * 8 * 32 + 4 * 3 * 5 * 8, 2 * 3 * 5 * 8 * 32)
    assert part["Domino head"][0] == work["Domino head"][0] - 4 * (5 * 16 + 3 * 5) * (48 - 8)
    assert part["verify"] == work["verify"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "16", "97"], "a context of 97 tokens cannot be timed; 1 .. 96 fit the target"),
        (["--block-size", "9"], "block size 9 is outside 1 .. 5"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_time_is_spent(pair, capsys, monkeypatch, options, message):
    monkeypatch.setattr(anatomy, "measure_rates", lambda *_: pytest.fail("the machine was measured"))
    assert profile(pair, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "t", "--profile"], "--draft"),
        (["--target", "t", "--draft", "d", "--profile", "--temperature", "1"], "--temperature"),
        (["--target", "t", "--draft", "d", "--profile", "--batches", "0"], "0 is not a number of 1 or more"),
        (["--target", "t", "--prompts", "p", "--batches", "2"], "--batches"),
    ],
)
def test_wrong_options(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        bench.main(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err
