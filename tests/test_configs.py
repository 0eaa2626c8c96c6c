"""Every file of configs/ loads, in every variant; the published recipe is the published one."""

import pytest

from domino_jax.config import ConfigError, TargetConfig, from_json_dict, to_json_dict
from domino_jax.config_flags import parse_config
from domino_jax.run_config import RunConfig
from domino_jax.runs.embedded import embedded_target_config
from domino_jax.training.draft_init import check_start

LOCATIONS = ["tiny.py", "stdlib.py", "qwen3.py", "qwen3.py:4b", "qwen3.py:8b"]


def qwen3_target(variant):
    sizes = {"8b": (4096, 12288), "4b": (2560, 9728)}
    hidden_size, intermediate_size = sizes[variant]
    return TargetConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=variant == "4b",
    )


@pytest.mark.parametrize("location", LOCATIONS)
def test_loads_and_survives_json(repository, location):
    config = parse_config(["--config", str(repository / "configs" / location)])
    assert from_json_dict(RunConfig, to_json_dict(config)) == config


def test_every_file_is_covered(repository):
    files = {path.name for path in (repository / "configs").glob("*.py")}
    assert files == {location.partition(":")[0] for location in LOCATIONS}


@pytest.mark.parametrize("name", ["tiny.py", "stdlib.py"])
def test_embedded_runs_need_nothing_from_outside(repository, name):
    config = parse_config(["--config", str(repository / "configs" / name)])
    corpus = config.corpus
    target = embedded_target_config(corpus, corpus.vocab_size)
    assert not config.target.path and not config.data.train_path
    draft = config.draft.resolve(target, mask_token_id=1)
    assert draft.has_head
    check_start(draft, target)
    assert config.data.max_length == max(corpus.bucket_widths) <= corpus.max_length


@pytest.mark.parametrize("variant", ["8b", "4b"])
def test_published_recipe(repository, variant):
    config = parse_config(["--config", str(repository / "configs" / f"qwen3.py:{variant}")])
    target = qwen3_target(variant)
    draft = config.draft.resolve(target, mask_token_id=-1)
    assert config.target.path == f"Qwen/Qwen3-{variant.upper()}"
    assert config.target.dtype == config.train.compute_dtype == "bfloat16"
    assert draft.target_layer_ids == (1, 9, 17, 25, 33)
    assert (draft.num_hidden_layers, draft.block_size, draft.pure_draft_prefix_len) == (5, 16, 1)
    assert draft.shift_label and draft.mask_token_id == 151669
    assert (draft.gru_hidden_dim, draft.emb_dim) == (1024, 256)
    assert (draft.intermediate_size, draft.head_dim) == (target.intermediate_size, target.head_dim)
    assert (config.objective.num_anchors, config.objective.loss_decay_gamma) == (512, 7.0)
    assert (config.objective.base_weight_start, config.objective.base_weight_decay_ratio) == (1.0, 1.0)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_ratio, optimizer.clip_norm) == (6e-4, 0.04, 1.0)
    assert (config.train.num_steps, config.train.num_epochs) == (0, 6.0)
    assert config.data.max_length == 3072 and config.data.enable_thinking is False


def test_a_start_without_a_configuration_lists_those_there_are(repository, monkeypatch):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError, match=r"choose one of: configs/qwen3\.py, configs/stdlib\.py, configs/tiny\.py$"):
        parse_config([])
