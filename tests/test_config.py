"""Configuration: validation, JSON round trip, command-line loading and its error messages."""

import dataclasses
import re

import pytest

from domino_jax.config import (
    ConfigError,
    SamplingConfig,
    TargetConfig,
    default_target_layer_ids,
    diff_configs,
    from_json_dict,
    near_names,
    to_json_dict,
)
from domino_jax.config_flags import (
    ExtraFlag,
    format_config,
    format_help,
    parse_command_line,
    parse_config,
    parse_or_exit,
)
from domino_jax.run_config import CorpusConfig, ObjectiveConfig, OptimizerConfig, RunConfig

CONFIG_FILE = """
from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.config_flags import choose_variant

def get_config(variant=""):
    variant = choose_variant(variant, ("small", "large"))
    return RunConfig(name=variant, corpus=CorpusConfig())
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(CONFIG_FILE)
    return "run.py"


def tiny_target(**changes):
    sizes = dict(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return TargetConfig(**(sizes | changes))


def test_json_round_trip():
    config = RunConfig(name="a", corpus=CorpusConfig())
    assert from_json_dict(RunConfig, to_json_dict(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("num_target_layers, num_draft_layers", [(36, 5), (36, 1), (4, 3), (28, 2)])
def test_default_layer_ids_lie_in_the_target(num_target_layers, num_draft_layers):
    ids = default_target_layer_ids(num_target_layers, num_draft_layers)
    assert len(ids) == num_draft_layers
    assert all(0 <= i < num_target_layers for i in ids)


def test_default_layer_ids_of_the_published_target():
    assert default_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)


@pytest.mark.parametrize(
    "changes, named",
    [({"vocab_size": 0}, "vocab_size"), ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 7}, "RoPE")],
)
def test_bad_target_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        tiny_target(**changes)


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"top_k": -1}, {"seed": -1}]
)
def test_bad_sampling_is_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        SamplingConfig(**changes)


def test_near_names():
    assert "num_steps" in near_names("num_step", ["num_steps", "seed"])
    assert "known names" in near_names("xyz", ["num_steps", "seed"])


def test_overrides_of_every_type(config_file):
    config = parse_config(
        [
            f"--config={config_file}",
            "--config.train.num_steps=3",
            "--config.optimizer.learning_rate=1",
            "--config.draft.target_layer_ids=(1,2)",
            "--config.draft.shift_label=false",
            "--config.data.enable_thinking",
            "--config.data.bad_rows",
            "fail",
            "--config.corpus.task=bodies",
            "--config.name=3",
        ]
    )
    assert config.train.num_steps == 3
    assert config.optimizer.learning_rate == 1.0
    assert config.draft.target_layer_ids == (1, 2)
    assert config.draft.shift_label is False
    assert config.data.enable_thinking is True
    assert config.data.bad_rows == "fail"
    assert config.corpus.task == "bodies"
    assert config.name == "3"


@pytest.mark.parametrize("text, value", [("5", (5,)), ("1,2", (1, 2)), ("[1,2]", (1, 2)), ("()", ())])
def test_tuple_forms(config_file, text, value):
    config = parse_config(["--config", config_file, f"--config.draft.target_layer_ids={text}"])
    assert config.draft.target_layer_ids == value


def test_optional_part_can_be_removed_and_brought_back(config_file):
    given = ["--config", config_file]
    paths = ["--config.target.path=t", "--config.data.train_path=d"]
    assert parse_config([*given, *paths, "--config.corpus=None"]).corpus is None
    config = parse_config([*given, "--config.corpus=None", "--config.corpus.vocab_size=512"])
    assert config.corpus == CorpusConfig(vocab_size=512)


def test_a_target_or_data_beside_a_corpus_are_never_ignored(config_file):
    for given in ("target.path", "data.train_path", "data.eval_path"):
        with pytest.raises(ConfigError, match=rf"{given} \('x'\) would be ignored.*--config.corpus=None"):
            parse_config(["--config", config_file, f"--config.{given}=x"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.name=..", "plain folder name"),
        ("--config.seed=-1", "seed is -1"),
        ("--config.optimizer.b2=1.0", "b2 is 1.0"),
        ("--config.data.bucket_widths=64,32", "bucket_widths are (64, 32)"),
        ("--config.data.bucket_widths=0,32", "must be positive, ascending"),
        ("--config.data.bucket_widths=32,4096", "at most max_length"),
        ("--config.objective.attention_chunk=0", "attention_chunk is 0"),
        ("--config.corpus.tokens_per_batch=8", "tokens_per_batch is 8"),
        ("--config.corpus.bucket_widths=48,4096", "bucket_widths reach 4096"),
        ("--config.corpus.response_max_new_tokens=4096", "response_max_new_tokens is 4096"),
        ("--config.corpus.num_train_chats=0", "num_train_chats is 0"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(config_file, override, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_config(["--config", config_file, override])


def test_variants(config_file):
    assert parse_config(["--config", config_file]).name == "small"
    assert parse_config(["--config", f"{config_file}:large"]).name == "large"


def test_extra_flags(config_file):
    flags = {"dry_run": ExtraFlag(False, "stop"), "stage": ExtraFlag("all", "which"), "n": ExtraFlag(1, "count")}
    line = parse_command_line(["--dry_run", f"--config={config_file}", "--n=4"], flags)
    assert line.extras == {"dry_run": True, "stage": "all", "n": 4}
    assert parse_command_line(["--nodry_run", f"--config={config_file}"], flags).extras["dry_run"] is False


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--config=run.py:huge"], ["huge", "small", "large"]),
        (["--config=rum.py"], ["rum.py", "run.py"]),
        (["--config"], ["configs/tiny.py"]),
        ([], ["--config is missing"]),
        (["--config=run.py", "--config=run.py"], ["2 times"]),
        (["--config=run.py", "--config.train.num_step=3"], ["train.num_step'", "did you mean", "train.num_steps"]),
        (["--config=run.py", "--config.num_steps=3"], ["train.num_steps"]),
        (["--config=run.py", "--config.zzz.q=3"], ["zzz.q", "known names"]),
        (["--config=run.py", "--config.train.num_steps=many"], ["train.num_steps", "'many'", "int"]),
        (["--config=run.py", "--config.train.num_steps=1.5"], ["train.num_steps", "'1.5'", "int"]),
        (["--config=run.py", "--config.train.num_steps=-1"], ["train", "num_steps is -1"]),
        (["--config=run.py", "--config.train.num_steps"], ["train.num_steps"]),
        (["--config=run.py", "--config.data.enable_thinking=maybe"], ["data.enable_thinking", "bool"]),
        (["--config=run.py", "--config.draft.target_layer_ids=a"], ["draft.target_layer_ids", "int"]),
        (["--config=run.py", "--config.corpus.task=poems"], ["corpus.task", "'rewrites', 'bodies'"]),
        (["--config=run.py", "--config.corpus=None"], ["target.path"]),
        (["--config=run.py", "--config.corpus=3"], ["None"]),
        (["--config=run.py", "--config.train=3"], ["group", "train.num_steps"]),
        (["--config=run.py", "--drry_run"], ["drry_run", "dry_run"]),
        (["--config=run.py", "stray"], ["'stray'"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(config_file, capsys, arguments, parts):
    with pytest.raises(SystemExit) as stopped:
        parse_or_exit(arguments, {"dry_run": ExtraFlag(False, "stop")})
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "text, part",
    [
        ("x = 1\n", "no get_config"),
        ("def get_config(:\n", "bad.py:1"),
        ("def get_config():\n    return 3\n", "int"),
        ("def get_config():\n    return 3\n", "no variants"),
    ],
)
def test_bad_configuration_files(tmp_path, text, part):
    path = tmp_path / "bad.py"
    path.write_text(text)
    location = f"{path}:large" if part == "no variants" else str(path)
    with pytest.raises(ConfigError, match=part):
        parse_config(["--config", location])


def test_help_lists_flags_and_leaves(config_file, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_or_exit(["--help"], {"dry_run": ExtraFlag(False, "stop early")}, "train a drafter")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text == format_help("train a drafter", {"dry_run": ExtraFlag(False, "stop early")}) + "\n"
    assert "--config.train.num_steps" in text and "stop early" in text


def test_printed_configuration_has_every_leaf(config_file):
    text = format_config(parse_config(["--config", config_file]))
    assert "train.num_steps: 0" in text.splitlines()
    assert 'corpus.task: "rewrites"' in text.splitlines()


def test_unknown_name_in_stored_configuration_is_refused():
    values = to_json_dict(RunConfig(name="a", corpus=CorpusConfig()))
    values["train"]["num_step"] = 3
    with pytest.raises(ConfigError, match=r"train\.num_step.*num_steps"):
        from_json_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (ObjectiveConfig, {"match_weight": 0.9}, "match_weight is 0.9, but match is 'none'"),
        (ObjectiveConfig, {"match": "kl", "lk_eta": 2.0}, "lk_eta is 2.0, but match is 'kl', not 'lk-hybrid'"),
        (ObjectiveConfig, {"dpace_alpha": 0.4}, "dpace_alpha is 0.4, but slot_weights is 'decay'"),
        (OptimizerConfig, {"momentum": 0.9}, "momentum is 0.9, but kind is 'adamw', not 'muon'"),
        (ObjectiveConfig, {"base_weight_shape": "constant"}, "the corrected logits would never learn"),
    ],
)
def test_settings_that_would_come_to_nothing_are_refused(part, values, message):
    with pytest.raises(ConfigError, match=message):
        part(**values)


def test_diff_configs_names_every_leaf():
    old = {"name": "tiny", "seed": 3, "draft": {"target_layer_ids": [1, 3], "block_size": 8}}
    new = {"name": "tiny", "draft": {"target_layer_ids": (1, 3), "block_size": 4}, "extra": 1}
    assert diff_configs(old, new) == [
        "seed: stored 3, now absent",
        "draft.block_size: stored 8, now 4",
        "extra: not stored, now 1",
    ]
    assert diff_configs(old, old) == []
