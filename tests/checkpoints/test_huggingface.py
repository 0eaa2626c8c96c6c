"""Public checkpoint layouts: golden files in and out, every refusal by name, memory, and what transformers reads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from domino_jax.checkpoints import huggingface
from domino_jax.checkpoints.huggingface import (
    check_draft_fits,
    load_draft,
    load_target,
    read_target_config,
    save_draft,
    save_target,
    target_table,
)
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import DraftConfig, TargetConfig

SMALL = TargetConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=5000.0,
    max_position_embeddings=64,
)
DRAFTS = ("A", "B", "C", "D", "E")


def make_public(config: TargetConfig, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {row.public: rng.standard_normal(row.shape).astype(dtype) for row in target_table(config)}


def write_config(directory: Path, config: TargetConfig = SMALL, **changes) -> None:
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
    }
    raw |= changes
    raw = {name: value for name, value in raw.items() if value != "absent"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))


def write_small(directory: Path, config: TargetConfig = SMALL, dtype=np.float32) -> dict[str, np.ndarray]:
    write_config(directory, config)
    public = make_public(config, dtype)
    save_file(public, directory / "model.safetensors")
    return public


def assert_equal_trees(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["target", "target_tied"])
def test_golden_target_is_read_and_written(golden_dir: Path, tmp_path: Path, name: str) -> None:
    config, params = load_target(str(golden_dir / name), "float32")
    stored = {}
    for file in (golden_dir / name).glob("*.safetensors"):
        stored |= load_file(file)
    assert np.array_equal(params["embed_tokens"], stored["model.embed_tokens.weight"])
    assert np.array_equal(params["layers_5"]["down_proj"], stored["model.layers.5.mlp.down_proj.weight"].T)
    assert np.array_equal(params["layers_0"]["q_norm"], stored["model.layers.0.self_attn.q_norm.weight"])
    assert ("lm_head" in params) != config.tie_word_embeddings
    save_target(tmp_path / "out", config, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(np.array_equal(written[n], stored[n]) for n in stored)
    again, params_again = load_target(str(tmp_path / "out"), "float32")
    assert again == config
    assert_equal_trees(params, params_again)


def test_old_and_new_config_forms_mean_the_same(golden_dir: Path, tmp_path: Path) -> None:
    old, _ = read_target_config(str(golden_dir / "target"))
    shutil.copy(golden_dir / "target" / "config.as_saved.json", tmp_path / "config.json")
    new, raw = read_target_config(str(tmp_path))
    assert "rope_theta" not in raw and raw["rope_parameters"]["rope_theta"] == old.rope_theta
    assert new == old


@pytest.mark.parametrize("name", ["target", "target_tied"])
def test_saved_config_is_read_by_transformers(golden_dir: Path, tmp_path: Path, name: str) -> None:
    from transformers import Qwen3Config

    config, params = load_target(str(golden_dir / name), "bfloat16")
    save_target(
        tmp_path, config, params, "bfloat16", extra_config={"eos_token_id": 3, "rope_parameters": {"rope_theta": 1}}
    )
    read = Qwen3Config.from_pretrained(tmp_path)
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": config.rope_theta}
    assert read.eos_token_id == 3
    assert str(read.dtype).endswith("bfloat16")
    for field in config.__dataclass_fields__:
        if field != "rope_theta":
            assert getattr(read, field) == getattr(config, field), field


def test_transformers_loads_the_saved_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    public = write_small(tmp_path / "in")
    config, params = load_target(str(tmp_path / "in"), "float32")
    save_target(tmp_path / "out", config, params, max_shard_bytes=2000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = {n: v.numpy() for n, v in model.state_dict().items()}
    assert state.keys() == public.keys()
    assert all(np.array_equal(state[n], public[n]) for n in public)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_float_type_is_read(tmp_path: Path, stored, wanted: str) -> None:
    public = write_small(tmp_path, dtype=stored)
    _, params = load_target(str(tmp_path), wanted)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {wanted}
    expected = public["model.layers.1.self_attn.k_proj.weight"].T.astype(params["norm"].dtype)
    assert np.array_equal(np.asarray(params["layers_1"]["k_proj"]), expected)


def test_tied_target_may_carry_a_head(tmp_path: Path) -> None:
    tied = replace(SMALL, tie_word_embeddings=True)
    write_config(tmp_path, tied)
    save_file(make_public(SMALL), tmp_path / "model.safetensors")
    _, params = load_target(str(tmp_path), "float32")
    assert "lm_head" not in params


def test_shards_are_written_read_and_replaced(tmp_path: Path) -> None:
    write_small(tmp_path / "in")
    config, params = load_target(str(tmp_path / "in"), "float32")
    save_target(tmp_path / "out", config, params, max_shard_bytes=1500)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_equal_trees(load_target(str(tmp_path / "out"), "float32")[1], params)
    save_target(tmp_path / "out", config, params)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    save_target(tmp_path / "out", config, params, max_shard_bytes=1500)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_equal_trees(load_target(str(tmp_path / "out"), "float32")[1], params)


def test_all_tensor_problems_are_reported_together(tmp_path: Path) -> None:
    public = write_small(tmp_path)
    del public["model.norm.weight"], public["model.layers.1.mlp.up_proj.weight"]
    public["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    public["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 24), np.float32)
    public["lm_head.weight"] = np.zeros((11, 8), np.float64)
    save_file(public, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_target(str(tmp_path), "float32")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.1.mlp.up_proj.weight, expected [12, 8]",
        "  missing: model.norm.weight, expected [8]",
        "  unexpected: model.layers.0.self_attn.q_proj.bias [24]",
        "  misshapen: model.layers.0.self_attn.q_proj.weight is [8, 24], expected [24, 8]",
        "  type: lm_head.weight is F64; float32, bfloat16 and float16 are read",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*supported: Qwen3ForCausalLM"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe.*supported: 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters holds full_attention"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
        ({"head_dim": "absent"}, "head_dim is missing"),
        ({"rope_theta": "absent"}, "rope_theta is missing"),
        ({"hidden_size": "8"}, "hidden_size is '8' of type str"),
        ({"num_attention_heads": 3}, "must be a multiple"),
    ],
)
def test_unsupported_target_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_target(str(tmp_path), "float32")


def test_default_rope_scaling_is_read(tmp_path: Path) -> None:
    write_config(tmp_path, rope_scaling={"rope_type": "default", "rope_theta": 7.0}, rope_theta="absent")
    assert read_target_config(str(tmp_path))[0].rope_theta == 7.0


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(CheckpointError, match="holds no "):
        load_target(str(tmp_path), "float32")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*Convert them to safetensors"):
        load_target(str(tmp_path), "float32")


@pytest.mark.parametrize("file_name", ["../other.safetensors", "/etc/model.safetensors", "sub/x.safetensors", "..", 3])
def test_index_that_leaves_the_directory_is_refused(tmp_path: Path, file_name) -> None:
    write_small(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": file_name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only plain file names"):
        load_target(str(tmp_path), "float32")


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    public = write_small(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(public, "a.safetensors") | {"x": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names b\.safetensors"):
        load_target(str(tmp_path), "float32")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(public, "a.safetensors") | {"x": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lack: x \(a\.safetensors\)"):
        load_target(str(tmp_path), "float32")
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*index\.json"):
        load_target(str(tmp_path), "float32")


@pytest.mark.parametrize("size", [0, 5, 400, -10])
def test_damaged_file_is_named(tmp_path: Path, size: int) -> None:
    write_small(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load_target(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nobody/no-such-model", "'nobody/no-such-model' is no local directory and could not be had"),
        ("./nowhere", "./nowhere is not a directory"),
        ("a/b/c", "a/b/c is not a directory"),
    ],
)
def test_unreachable_checkpoint_is_a_clear_error(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_target(path, "float32")


def test_unknown_dtype_is_refused(golden_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype is 'int8'; allowed: float32, bfloat16, float16"):
        load_target(str(golden_dir / "target"), "int8")


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draft_import_export_is_exact(golden_dir: Path, tmp_path: Path, name: str, dtype: str) -> None:
    source = golden_dir / "draft" / name
    raw = json.loads((source / "config.json").read_text()) | {"unknown": {"kept": [1, None]}}
    raw["dflash_config"]["also_unknown"] = "kept"
    tensors = {
        n: t.astype(huggingface.parse_float_type(dtype)) for n, t in load_file(source / "model.safetensors").items()
    }
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    draft = load_draft(str(tmp_path / "in"), dtype)
    assert draft.config.has_head == ("head" in draft.params) == (name != "D")
    save_draft(tmp_path / "out", draft.config, draft.params, draft.raw_config, dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.shape, t.dtype, t.tobytes()) for n, t in written.items()} == {
        n: (t.shape, t.dtype, t.tobytes()) for n, t in tensors.items()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == raw | {"dtype": dtype}


@pytest.mark.parametrize("name", DRAFTS)
def test_new_draft_config_is_the_public_one(golden_dir: Path, tmp_path: Path, name: str) -> None:
    draft = load_draft(str(golden_dir / "draft" / name), "float32")
    save_draft(tmp_path, draft.config, draft.params)
    written = json.loads((tmp_path / "config.json").read_text())
    fields = {k: v for k, v in draft.raw_config.items() if v is not None}
    assert {k: v for k, v in written.items() if v is not None} == fields
    assert load_draft(str(tmp_path), "float32").config == draft.config


def test_golden_draft_shapes_and_layout(golden_dir: Path) -> None:
    draft = load_draft(str(golden_dir / "draft" / "A"), "float32")
    stored = load_file(golden_dir / "draft" / "A" / "model.safetensors")
    assert draft.config.shift_label and draft.config.pure_draft_prefix_len == 1
    assert draft.config.target_layer_ids == (1, 3) and draft.config.mask_token_id == 511
    head = draft.params["head"]
    assert {n: v.shape for n, v in head.items()} == {
        "gru_input": (64, 144),
        "gru_hidden": (48, 144),
        "down": (112, 32),
        "up": (32, 512),
    }
    assert np.array_equal(head["down"][:64], stored["embed_proj.0.weight"][:, :64].T)


def test_changed_fields_reach_every_public_place(golden_dir: Path, tmp_path: Path) -> None:
    draft = load_draft(str(golden_dir / "draft" / "D"), "float32")
    changed = replace(draft.config, mask_token_id=7, block_size=4, rope_theta=99.0, target_layer_ids=(0, 2))
    save_draft(tmp_path, changed, draft.params, draft.raw_config)
    assert load_draft(str(tmp_path), "float32").config == changed
    with_head = load_draft(str(golden_dir / "draft" / "B"), "float32")
    with pytest.raises(CheckpointError, match="save without raw_config"):
        save_draft(tmp_path, with_head.config, with_head.params, draft.raw_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("dflash_config"), "dflash_config is missing"),
        (lambda raw: raw["dflash_config"].pop("mask_token_id"), "dflash_config.mask_token_id is missing"),
        (lambda raw: raw["dflash_config"].pop("gru_hidden_dim"), "dflash_config.gru_hidden_dim is missing"),
        (lambda raw: raw["dflash_config"].update(projector_type="eagle"), "projector_type is 'eagle'"),
        (lambda raw: raw.pop("block_size"), "block_size is missing"),
        (lambda raw: raw.update(architectures=["Qwen3ForCausalLM"]), "supported: DominoDraftModel, DFlashDraftModel"),
        (lambda raw: raw["dflash_config"].update(target_layer_ids=[1, 9]), "target_layer_ids holds 9"),
        (lambda raw: raw["dflash_config"].update(mask_token_id=512), "mask_token_id is 512"),
        (lambda raw: raw["dflash_config"].update(shift_label="yes"), "shift_label is 'yes'"),
    ],
)
def test_unusable_draft_is_refused(golden_dir: Path, tmp_path: Path, change, message: str) -> None:
    raw = json.loads((golden_dir / "draft" / "A" / "config.json").read_text())
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        load_draft(str(tmp_path), "float32")


def test_missing_layer_ids_follow_the_public_rule(golden_dir: Path, tmp_path: Path) -> None:
    raw = json.loads((golden_dir / "draft" / "A" / "config.json").read_text())
    del raw["dflash_config"]["target_layer_ids"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(golden_dir / "draft" / "A" / "model.safetensors", tmp_path)
    assert load_draft(str(tmp_path), "float32").config.target_layer_ids == (1, 3)


def test_draft_must_fit_its_target(golden_dir: Path) -> None:
    draft: DraftConfig = load_draft(str(golden_dir / "draft" / "A"), "float32").config
    check_draft_fits(draft, read_target_config(str(golden_dir / "target"))[0])
    other = replace(SMALL, num_hidden_layers=3)
    with pytest.raises(CheckpointError) as caught:
        check_draft_fits(draft, other)
    assert str(caught.value).splitlines()[1:] == [
        "  hidden_size is 64, the target's hidden_size is 8",
        "  vocab_size is 512, the target's vocab_size is 11",
        "  num_target_layers is 6, the target's num_hidden_layers is 3",
        "  target_layer_ids holds [3], the target has layers 0 .. 2",
        "  mask_token_id is 511, the target's ids are 0 .. 10",
    ]


def test_params_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    write_small(tmp_path / "in")
    config, params = load_target(str(tmp_path / "in"), "float32")
    broken = {n: v for n, v in params.items() if n != "norm"} | {"extra": params["norm"], "lm_head": params["norm"]}
    with pytest.raises(CheckpointError) as caught:
        save_target(tmp_path / "out", config, broken)
    for part in ("missing: norm, expected [8]", "unexpected: extra [8]", "misshapen: lm_head is [8], expected [11, 8]"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    public = write_small(tmp_path)
    config, params = load_target(str(tmp_path), "float32")
    params = dict(params) | {"norm": params["norm"] * 1e6}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that float16 cannot hold"):
        save_target(tmp_path, config, params, "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    kept = load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(kept[n], public[n]) for n in public)
