"""What is exported for SGLang, SpecForge, vLLM and speculators is what their loaders ask for, or is refused."""

import ast
import json
import shutil
from math import prod
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from domino_jax.checkpoints.huggingface import load_draft
from domino_jax.checkpoints.safetensors_io import CheckpointError

VERIFIER = "Qwen/Qwen3-8B"
TYPES = {
    "int": lambda v: type(v) is int,
    "float": lambda v: type(v) in (int, float),
    "bool": lambda v: type(v) is bool,
    "ints": lambda v: bool(v) and all(type(n) is int for n in v),
    "false": lambda v: v is False,
}
NAMES = ["sglang", "specforge", "vllm", "speculators"]


@pytest.fixture(scope="module", params=NAMES)
def contract(request):
    file = Path(__file__).parent / "contracts" / f"{request.param}.json"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def export(run_script, tmp_path):
    """Export a drafter for a loader and return the directory."""

    def run(source: Path, loader: str, *arguments: str) -> Path:
        verifier = ["--verifier", VERIFIER] if loader == "speculators" else []
        command = ["--source", str(source), "--output", str(tmp_path / "out"), "--layout", loader]
        assert run_script([*command, *verifier, *arguments]) == 0
        return tmp_path / "out"

    return run


def look_up(config, path):
    for key in path.split("."):
        config = config[int(key) if isinstance(config, list) else key]
    return config


def evaluate(expression, sizes):
    """Return the value of a sum of products of numbers and names."""
    return sum(
        prod(int(word) if word.isdigit() else sizes[word] for word in term.split(" * "))
        for term in expression.split(" + ")
    )


def read_tensors(directory):
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def check_against(contract, directory, has_head):
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    fields = contract["config"] | (contract["head_config"] if has_head else {})
    layers = config.get("transformer_layer_config", config)
    for path, expected in fields.items():
        value = look_up(config, path)
        if expected == "full_attention":
            assert value == ["full_attention"] * layers["num_hidden_layers"], path
        elif expected in TYPES:
            assert TYPES[expected](value), f"{path} is {value!r}, the loader wants {expected}"
        else:
            assert value == ast.literal_eval(expected), path
    nested = config.get("dflash_config", {})
    features = nested.get("target_layer_ids") or config["aux_hidden_state_layer_ids"]
    sizes = layers | nested | {"num_features": len(features)}
    table = contract["tensors"] | (contract["head_tensors"] if has_head else {})
    shapes = {
        name.format(i=i): [evaluate(size, sizes) for size in shape]
        for name, shape in table.items()
        for i in range(layers["num_hidden_layers"])
    }
    tensors = read_tensors(directory)
    assert {name: shape for name, (shape, _) in tensors.items()} == shapes
    assert {code for _, code in tensors.values()} <= set(contract["head_types" if has_head else "types"])
    return config


def test_plain_drafter(contract, export, golden_dir):
    config = check_against(contract, export(golden_dir / "draft/D", contract["loader"]), has_head=False)
    if contract["loader"] == "speculators":
        original = json.loads((golden_dir / "draft/D/config.json").read_text())
        ids = original["dflash_config"]["target_layer_ids"]
        assert config["aux_hidden_state_layer_ids"] == [i + 1 for i in ids]
        (method,) = config["speculators_config"]["proposal_methods"]
        assert method["speculative_tokens"] == original["block_size"] - 1
        assert config["draft_vocab_size"] == original["vocab_size"]
        assert config["mask_token_id"] == original["dflash_config"]["mask_token_id"]


def test_drafter_with_a_head(contract, export, golden_dir, run_script, tmp_path, capsys):
    source = golden_dir / "draft/A"
    if contract["heads"]:
        check_against(contract, export(source, contract["loader"], "--dtype", "bfloat16"), has_head=True)
        return
    command = ["--source", str(source), "--output", str(tmp_path / "out"), "--layout", contract["loader"]]
    assert run_script([*command, *(["--verifier", VERIFIER] if contract["loader"] == "speculators" else [])]) == 2
    assert "has a Domino head (gru_hidden_dim 48), which vLLM does not run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loader", NAMES)
def test_what_was_exported_comes_back(loader, export, golden_dir):
    source = load_draft(str(golden_dir / "draft/D"), "float32")
    back = load_draft(str(export(golden_dir / "draft/D", loader)), "float32")
    assert back.config == source.config
    jax.tree.map(np.testing.assert_array_equal, back.params, source.params)


def test_a_head_comes_back(export, golden_dir):
    source = load_draft(str(golden_dir / "draft/A"), "float32")
    back = load_draft(str(export(golden_dir / "draft/A", "specforge")), "float32")
    assert back.config == source.config
    jax.tree.map(np.testing.assert_array_equal, back.params, source.params)


def test_the_contract_sees_another_export(golden_dir, tmp_path):
    """The check itself: a drafter of another loader, or with a tensor too many, is not let through."""
    contract = json.loads((Path(__file__).parent / "contracts" / "sglang.json").read_text())
    check_against(contract, golden_dir / "draft/D", has_head=False)
    with pytest.raises(AssertionError, match="architectures"):
        check_against(contract, golden_dir / "draft/A", has_head=True)  # DominoDraftModel is no entry of SGLang
    with pytest.raises(AssertionError):
        check_against(contract, golden_dir / "draft/A", has_head=False)


def edit(golden_dir, tmp_path, name="D", **nested):
    shutil.copytree(golden_dir / "draft" / name, tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text())
    raw["dflash_config"] |= nested
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    return str(tmp_path / "in")


@pytest.mark.parametrize(
    ("loader", "name", "nested", "message"),
    [
        ("sglang", "D", {"shift_label": True}, "shift_label is true without a head"),
        ("vllm", "D", {"shift_label": True}, "train it with draft.shift_label=False"),
        ("vllm", "D", {"target_layer_ids": [3, 1]}, "target_layer_ids are [3, 1]; features are collected in ascending"),
        ("vllm", "D", {"target_layer_ids": [1, 5]}, "end with 5, the target's last layer"),
        ("sglang", "A", {}, "the weights are float32; SGLang takes a Domino head in bfloat16 only"),
        ("sglang", "A", {"pure_draft_prefix_len": 0}, "pure_draft_prefix_len is 0; SGLang leaves exactly the first"),
    ],
)
def test_what_a_loader_cannot_express_is_refused(
    loader, name, nested, message, golden_dir, tmp_path, run_script, capsys
):
    source = edit(golden_dir, tmp_path, name, **nested)
    assert run_script(["--source", source, "--output", str(tmp_path / "out"), "--layout", loader]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_verifier_belongs_to_speculators(golden_dir, tmp_path, run_script, capsys):
    draft, target, output = str(golden_dir / "draft/D"), str(golden_dir / "target"), str(tmp_path / "out")
    assert run_script(["--source", draft, "--output", output, "--layout", "speculators"]) == 2
    assert "which its config.json names: give --verifier" in capsys.readouterr().err
    assert run_script(["--source", draft, "--output", output, "--layout", "vllm", "--verifier", VERIFIER]) == 2
    assert "leave --verifier out" in capsys.readouterr().err
    assert run_script(["--source", target, "--output", output, "--layout", "vllm"]) == 2
    assert "is a target, which all of these programs load as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculators_model_type": "eagle3"}, "speculators_model_type is 'eagle3'; supported: 'dflash'"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids is missing"),
        ({"draft_vocab_size": 100}, "draft_vocab_size is 100, vocab_size 512"),
        ({"sample_from_anchor": True}, "sample_from_anchor is true; supported: false"),
        ({"transformer_layer_config": {"vocab_size": 512}}, "num_target_layers is missing"),
    ],
)
def test_what_cannot_be_read_back_is_refused(change, message, export, golden_dir):
    directory = export(golden_dir / "draft/D", "speculators")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(CheckpointError, match=message):
        load_draft(str(directory), "float32")
