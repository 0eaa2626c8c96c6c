"""`bench.py` run for real on a checkpoint of a few thousand parameters: every option, rows, table and exit status."""

import json
import shutil

import jax
import pytest

import bench
from domino_jax.checkpoints.huggingface import save_draft, save_target
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
from domino_jax.evaluation.benchmark import ROW_FIELDS
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.ops import cpu_kernels
from scripts import calibrate_survival, choose_draft_vocabulary

BUDGET, BLOCK, CONTEXT = 8, 4, 64
LINES = [
    {"prompt": "alpha beta"},
    {"messages": [{"role": "user", "content": "say gamma"}]},
    {"prompt_ids": [5, 6, 7]},
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A random target with a tokenizer and its drafter; targets without template, end token; a file of all forms."""
    root = tmp_path_factory.mktemp("bench")
    tokenizer = train_tokenizer(["alpha beta gamma delta"] * 4, 280)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
    }
    target = TargetConfig(num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    draft = DraftConfig(
        num_hidden_layers=1,
        num_target_layers=2,
        target_layer_ids=(0, 1),
        block_size=BLOCK,
        mask_token_id=3,
        gru_hidden_dim=8,
        emb_dim=4,
        shift_label=True,
        **sizes,
    )
    save_target(root / "target", target, init_target_params(target, jax.random.key(0)))
    save_draft(root / "draft", draft, init_draft_params(draft, jax.random.key(1)))
    shutil.copytree(root / "target", root / "no_template")
    shutil.copytree(root / "target", root / "no_end")
    save_tokenizer(tokenizer, root / "target")
    tokenizer.chat_template = None
    save_tokenizer(tokenizer, root / "no_template")
    tokenizer.eos_token = None
    save_tokenizer(tokenizer, root / "no_end")
    write_lines(root / "prompts.jsonl", LINES)
    return root


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def run(material, tmp_path, capsys):
    """Run the command and return exit status, rows (None where no file was written), and what was printed."""

    def run_bench(*options, target="target", prompts=material / "prompts.jsonl", draft=True):
        output = tmp_path / "rows.jsonl"
        output.unlink(missing_ok=True)
        command = ["--target", material / target, "--prompts", prompts, "--output", output]
        command += ["--draft", material / "draft"] * draft
        status = bench.main([*map(str, command), "--max-new-tokens", str(BUDGET), *map(str, options)])
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None
        return status, rows, capsys.readouterr()

    return run_bench


def read_settings(printed):
    (line,) = [line for line in printed.out.splitlines() if line.startswith("settings: ")]
    assert printed.out.startswith(line)
    return json.loads(line.removeprefix("settings: "))


def assert_speculative(rows, printed, block=BLOCK):
    for row in rows:
        assert set(row) == set(ROW_FIELDS)
        assert row["identical"] is True and row["output_ids"] == row["plain_output_ids"]
        assert sum(row["acceptance_lengths"]) == len(row["output_ids"]) - 1
        assert row["block_size"] == block and row["num_draft_tokens"] == (block if block > 1 else 0)
        assert row["decode_s"] > 0 and row["plain_decode_s"] > 0
    assert f"identical to plain decoding   {len(rows)} of {len(rows)}" in printed.out
    assert "tau, mean over prompts" in printed.out


def test_without_a_drafter_plain_decoding_is_measured(run, material):
    status, rows, printed = run(draft=False)
    assert status == 0 and len(rows) == len(LINES)
    for row in rows:
        assert set(row) == set(ROW_FIELDS)
        assert row["draft"] is row["acceptance_lengths"] is row["decode_s"] is row["identical"] is None
        assert row["output_ids"] == row["plain_output_ids"] and row["plain_decode_s"] > 0
        assert row["block_size"] == 1 and row["use_head"] is False
    assert rows[2]["prompt_ids"] == [5, 6, 7]
    assert rows[0]["prompt_ids"] != rows[1]["prompt_ids"]
    assert all(isinstance(row["text"], str) for row in rows)
    assert "plain loop, tokens/s" in printed.out and "tau" not in printed.out


def test_a_drafter_is_rounded_where_asked(run, material):
    status, rows, printed = run("--draft-weights", "bfloat16")
    assert status == 0
    assert_speculative(rows, printed)
    settings = read_settings(printed)
    assert (settings["target_weights"], settings["draft_weights"]) == ("float32", "bfloat16")
    assert settings["draft_lm_head"] == ("bfloat16" if settings["cpu_kernels"] else "float32")


def test_a_drafter_that_is_not_there_is_not_rounded(run, material):
    status, rows, printed = run("--draft-weights", "bfloat16", draft=False)
    assert status == 2 and rows is None
    assert "--draft-weights bfloat16 is given but no drafter" in printed.err


def test_the_three_forms_and_the_settings(run, material):
    status, rows, printed = run()
    assert status == 0
    assert_speculative(rows, printed)
    settings = read_settings(printed)
    assert settings.pop("prompts") == str(material / "prompts.jsonl")
    assert settings == {
        "target": str(material / "target"),
        "draft": str(material / "draft"),
        "dtype": "float32",
        "target_weights": "float32",
        "draft_weights": "float32",
        "draft_lm_head": "float32",
        "cpu_kernels": cpu_kernels.has_kernels_for("float32"),
        "mesh": None,
        "rule": "seed-exact",
        "block_size": BLOCK,
        "verify_widths": [],
        "use_head": True,
        "num_candidates": 0,
        "draft_vocab_size": 0,
        "batch_size": 1,
        "repeats": 1,
        "stop_ids": [2],
        "max_new_tokens": BUDGET,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
    }
    for index, row in enumerate(rows):
        assert {name: row[name] for name in settings} == settings | {"seed": index}
        assert row["prompt_index"] == index


def test_seed_exact_sampling_is_identical(run):
    status, rows, printed = run("--temperature", 0.7, "--seed", 3)
    assert status == 0
    assert_speculative(rows, printed)
    assert [row["seed"] for row in rows] == [3, 4, 5]
    assert {row["temperature"] for row in rows} == {0.7}


def test_rejection_promises_no_equality(run):
    options = ("--rule", "rejection", "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01)
    status, rows, printed = run(*options)
    assert status == 0
    assert "identical to plain decoding   not promised" in printed.out
    expected = {"rule": "rejection", "top_k": 20, "top_p": 0.9, "min_p": 0.01, "identical": None}
    assert [{name: row[name] for name in expected} for row in rows] == [expected] * 3
    assert all(row["output_ids"] and row["acceptance_lengths"] for row in rows)


def test_bfloat16_without_the_head(run):
    status, rows, _ = run("--dtype", "bfloat16", "--no-head", "--limit", 1)
    assert status == 0 and len(rows) == 1
    assert rows[0]["dtype"] == "bfloat16" and rows[0]["use_head"] is False
    assert len(rows[0]["output_ids"]) == BUDGET and sum(rows[0]["acceptance_lengths"]) == BUDGET - 1
    assert rows[0]["identical"] is (rows[0]["output_ids"] == rows[0]["plain_output_ids"])


def test_stop_ids_end_a_text_there(run):
    whole = run("--stop-ids", "", "--limit", 1)[1][0]
    assert whole["finish_reason"] == "length" and whole["stop_ids"] == []
    stop = whole["output_ids"][3]
    end = whole["output_ids"].index(stop) + 1
    status, (row,), printed = run("--stop-ids", stop, "--limit", 1)
    assert status == 0 and "(stop 1)" in printed.out
    assert row["output_ids"] == whole["output_ids"][:end]
    assert row["finish_reason"] == "stop" and row["stop_ids"] == [stop] and row["identical"] is True
    status, rows, printed = run("--stop-ids", "5;7")
    assert (status, rows) == (2, None) and "'5;7'; give token ids with commas" in printed.err


def test_batches_and_repeats(run):
    single = run()[1]
    status, rows, printed = run("--batch-size", 2, "--repeats", 2)
    assert status == 0
    assert_speculative(rows, printed)
    assert [row["batch_id"] for row in rows] == [0, 0, 1]
    assert [row["output_ids"] for row in rows] == [row["output_ids"] for row in single]
    assert {(row["batch_size"], row["repeats"]) for row in rows} == {(2, 2)}


@pytest.mark.parametrize("block", [1, 3])
def test_block_sizes(run, block):
    status, rows, printed = run("--block-size", block)
    assert status == 0
    assert_speculative(rows, printed, block)
    if block == 1:
        assert {length for row in rows for length in row["acceptance_lengths"]} == {1}


def test_widths_are_chosen_by_a_calibration(run, material, tmp_path, capsys):
    file = tmp_path / "survival.json"
    status, rows, printed = run("--verify-widths", 4, 2, "--calibration", file)
    assert (status, rows) == (2, None) and "no survival calibration at" in printed.err
    pair = ["--target", material / "target", "--draft", material / "draft", "--prompts", material / "prompts.jsonl"]
    widths = ["--widths", "2", "4", "--max-new-tokens", BUDGET, "--output", file]
    assert calibrate_survival.main([*map(str, [*pair, *widths])]) == 0
    assert "block 4: kept, by slot: " in capsys.readouterr().out
    status, rows, printed = run("--verify-widths", 4, 2, "--calibration", file)
    assert status == 0
    assert_speculative(rows, printed)
    assert rows[0]["verify_widths"] == read_settings(printed)["verify_widths"] == [2, 4]
    assert sum(rows[0]["choices"].values()) > 0 and "acceptance by slot" in printed.out
    for widths, message in (((2, 3), "has block sizes 2, 4, not 3"), ((1, 2), "from 2 on"), ((2, 99), "99")):
        status, rows, printed = run("--verify-widths", *widths, "--calibration", file)
        assert (status, rows) == (2, None) and message in printed.err, "refused before rows are written"
    status, rows, printed = run("--calibration", file)
    assert (status, rows) == (2, None) and "is for --verify-widths" in printed.err


def test_drafts_from_a_chosen_vocabulary(run, material, tmp_path, capsys):
    file = tmp_path / "draft_vocabulary.json"
    status, rows, printed = run("--draft-vocabulary", file)
    assert (status, rows) == (2, None) and "no draft vocabulary at" in printed.err
    turns = [{"role": "user", "content": "say gamma"}, {"role": "assistant", "content": "gamma delta gamma"}]
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    command = ["--target", material / "target", "--data", chats, "--output", file]
    assert choose_draft_vocabulary.main([*map(str, command), "--size", "16"]) == 0
    printed = capsys.readouterr().out
    assert "rows: 20 (0 could not be used)" in printed
    assert "16 tokens have 100.00% of the held-out rows' tokens <- chosen" in printed
    status, rows, printed = run("--draft-vocabulary", file)
    assert status == 0
    assert_speculative(rows, printed)
    assert rows[0]["draft_vocab_size"] == read_settings(printed)["draft_vocab_size"] == 16
    chosen = set(json.loads(file.read_text())["token_ids"])
    for row in rows:
        pairs = zip(row["output_ids"], row["token_sources"], strict=True)
        assert {token for token, source in pairs if source == "drafted"} <= chosen
    widths = ["--verify-widths", 2, 4, "--calibration", tmp_path / "survival.json"]
    calibrate = [
        "--target",
        material / "target",
        "--draft",
        material / "draft",
        "--prompts",
        material / "prompts.jsonl",
    ]
    calibrate += ["--widths", 2, 4, "--max-new-tokens", BUDGET, "--draft-vocabulary", file, "--output", widths[-1]]
    assert calibrate_survival.main([*map(str, calibrate)]) == 0
    status, rows, printed = run(*widths)
    message = "was made with a draft vocabulary of 16, rounds draft from all tokens; calibrate with the same"
    assert (status, rows) == (2, None) and message in printed.err
    assert run(*widths, "--draft-vocabulary", file)[0] == 0
    status, rows, printed = run("--draft-vocabulary", file, draft=False)
    assert (status, rows) == (2, None) and "is given but no drafter; name one with --draft" in printed.err
    assert choose_draft_vocabulary.main([*map(str, command), "--size", "99999"]) == 2
    assert "a draft vocabulary of 99999 tokens was asked for" in capsys.readouterr().err


def test_text_needs_no_chat_template(run, material, tmp_path):
    no_chat = write_lines(tmp_path / "no_chat.jsonl", [LINES[0], LINES[2]])
    status, rows, printed = run(target="no_template", prompts=no_chat)
    assert status == 0
    assert_speculative(rows, printed)
    assert all(isinstance(row["text"], str) for row in rows)
    status, rows, printed = run(target="no_template")
    assert (status, rows) == (2, None) and "has no chat template" in printed.err


def test_given_stop_ids_need_no_end_token(run, tmp_path):
    no_chat = write_lines(tmp_path / "no_chat.jsonl", [LINES[0]])
    status, rows, printed = run(target="no_end", prompts=no_chat)
    assert (status, rows) == (2, None)
    assert "no stop id" in printed.err and "or give --stop-ids" in printed.err
    status, rows, _ = run("--stop-ids", "", target="no_end", prompts=no_chat)
    assert status == 0 and len(rows[0]["output_ids"]) == BUDGET


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt_ids": [5, 9999]}, "line 3 holds token id 9999; the vocabulary has ids 0 .. "),
        ({"prompt_ids": [5] * CONTEXT}, f"line 3 has {CONTEXT} tokens; the model's context holds {CONTEXT}"),
        ({"prompt": "alpha beta " * CONTEXT}, "line 3 has "),
    ],
)
def test_prompts_are_checked_before_the_first_is_decoded(material, tmp_path, capsys, monkeypatch, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt_ids": [5]}) + "\n\n" + json.dumps(line))
    output = tmp_path / "rows.jsonl"
    output.write_text("rows of another run\n")
    monkeypatch.setattr(bench.Decoder, "generate", None)
    command = ["--target", material / "target", "--prompts", path, "--output", output]
    assert bench.main([*map(str, command)]) == 2
    assert f"{path}, {message}" in capsys.readouterr().err
    assert output.read_text() == "rows of another run\n"


def test_an_output_that_cannot_be_written_is_refused_first(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_target", None)
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "rows.jsonl"):
        command = ["--target", material / "target", "--prompts", material / "prompts.jsonl", "--output", output]
        assert bench.main([*map(str, command)]) == 2
        error = capsys.readouterr().err
        assert f"rows cannot be written to {output} (" in error and error.count("\n") == 1


def test_a_refused_run_leaves_no_empty_rows(run, tmp_path):
    status, rows, printed = run(prompts=write_lines(tmp_path / "p.jsonl", [{"nothing": 1}]))
    assert (status, rows) == (2, None) and "line 1" in printed.err
