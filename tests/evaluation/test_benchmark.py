import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import bench
from domino_jax.config import DraftConfig, SamplingConfig, TargetConfig
from domino_jax.decoding.generate import Decoder, DecodingError
from domino_jax.evaluation import benchmark, metrics
from domino_jax.evaluation.benchmark import BenchmarkSettings, TextCodec
from domino_jax.evaluation.prompts import Prompt, PromptError
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def decoder():
    target = TargetConfig(num_hidden_layers=2, **SIZES)
    draft = DraftConfig(
        num_hidden_layers=1,
        num_target_layers=2,
        target_layer_ids=(1,),
        block_size=3,
        mask_token_id=31,
        gru_hidden_dim=4,
        emb_dim=4,
        shift_label=True,
        **SIZES,
    )
    keys = jax.random.split(jax.random.key(0))
    return Decoder(target, init_target_params(target, keys[0]), draft, init_draft_params(draft, keys[1]))


def test_rows_of_both_loops(decoder):
    prompts = [Prompt(prompt_ids=[1, 2, 3]), Prompt(prompt_ids=[4]), Prompt(prompt_ids=[5, 6])]
    rows = list(benchmark.measure(decoder, prompts, BenchmarkSettings(max_new_tokens=6, batch_size=2), None))
    assert [row["prompt_index"] for row in rows] == [0, 1, 2]
    assert [row["batch_id"] for row in rows] == [0, 0, 1]
    for row, prompt in zip(rows, prompts, strict=True):
        assert set(row) == set(benchmark.ROW_FIELDS)
        assert row["prompt_ids"] == prompt.prompt_ids
        assert row["identical"] is True and row["first_difference"] is None
        assert len(row["output_ids"]) == 6 and row["text"] is None
        assert sum(row["acceptance_lengths"]) == 5
        assert row["decode_s"] > 0 and row["plain_decode_s"] > 0
        json.dumps(row)
    table = metrics.summarise(rows)
    assert table["num_identical"] == 3
    assert "tau, mean over rounds" in benchmark.format_table(table)


def test_rejection_promises_no_equality_and_seeds_follow_the_prompts(decoder):
    settings = BenchmarkSettings(5, SamplingConfig(temperature=1.0, seed=7), rule="rejection", batch_size=2)
    rows = list(benchmark.measure(decoder, [Prompt(prompt_ids=[1]), Prompt(prompt_ids=[2])], settings, None))
    assert [row["identical"] for row in rows] == [None, None]
    assert [row["seed"] for row in rows] == [7, 8]
    assert "not promised" in benchmark.format_table(metrics.summarise(rows))


def test_turns_go_on_from_the_answer(decoder):
    seen = []

    def encode_chat(messages):
        seen.append(messages)
        return [len(messages)]

    codec = TextCodec(lambda text: [1], encode_chat, lambda ids: "answer")
    settings = BenchmarkSettings(max_new_tokens=3, batch_size=2)
    rows = list(benchmark.measure(decoder, [Prompt(turns=["one", "two"])], settings, codec))
    assert [(row["prompt_index"], row["turn"]) for row in rows] == [(0, 0), (0, 1)]
    assert [m["role"] for m in seen[-1]] == ["user", "assistant", "user"]
    assert [m["content"] for m in seen[-1]] == ["one", "answer", "two"]


def test_text_needs_a_tokenizer(decoder):
    with pytest.raises(PromptError, match=r"prompt 1 is text .* no tokenizer"):
        benchmark.measure(decoder, [Prompt(text="a")], BenchmarkSettings(2), None)


def test_a_wrong_prompt_is_named_before_any_is_decoded(decoder):
    with pytest.raises(DecodingError, match="prompt 2 is empty"):
        benchmark.measure(decoder, [Prompt(prompt_ids=[1]), Prompt(prompt_ids=[])], BenchmarkSettings(2), None)


def test_a_later_turn_is_named_by_its_prompt(decoder):
    codec = TextCodec(lambda text: [1], lambda messages: [] if len(messages) > 1 else [1], lambda ids: "answer")
    prompts = [Prompt(turns=["one", "two"], name="mt-bench, prompt 1")]
    rows = benchmark.measure(decoder, prompts, BenchmarkSettings(max_new_tokens=3, batch_size=2), codec)
    with pytest.raises(DecodingError, match="mt-bench, prompt 1, turn 2, is empty"):
        list(rows)


def test_command_line_gives_the_recorded_rows(tmp_path):
    cases = json.loads((GOLDEN / "spec_generate" / "A.json").read_text())["cases"][:2]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt_ids": case["prompt"]}) for case in cases))
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, ROOT / "bench.py", "--target", GOLDEN / "target", "--draft", GOLDEN / "draft" / "A"]
    command += ["--prompts", tmp_path / "p.jsonl", "--max-new-tokens", "64", "--batch-size", "2", "--output", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row, case in zip(rows, cases, strict=True):
        assert row["prompt_ids"] + row["output_ids"] == case["output_ids"]
        assert row["acceptance_lengths"] == case["acceptance_lengths"]


@pytest.mark.parametrize(
    ("line", "extra", "message"),
    [
        ({"prompt": "a"}, (), "holds no tokenizer"),
        ({"prompt_ids": [1, 9999]}, (), "vocabulary"),
        ({"nothing": 1}, (), "line 1"),
        ({"prompt_ids": [1]}, ("--block-size", 4), "no --draft"),
        ({"prompt_ids": [1]}, ("--draft", GOLDEN / "draft" / "C"), "vocab"),
        ({"prompt_ids": [1]}, ("--draft", GOLDEN / "draft" / "A", "--block-size", 99), "outside 1"),
    ],
)
def test_command_line_refuses_in_one_sentence(tmp_path, capsys, line, extra, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    command = ["--target", GOLDEN / "target", "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 2, *extra]
    assert bench.main(list(map(str, command))) == 2
    assert message in capsys.readouterr().err
