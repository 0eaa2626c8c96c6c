"""The conversion script: same tensors, side files, chosen type, errors as sentences."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file


@pytest.mark.parametrize("name", ["target_tied", "draft/A", "draft/D"])
def test_same_tensors_come_out(golden_dir: Path, tmp_path: Path, run_script, name: str) -> None:
    shutil.copytree(golden_dir / name, tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "in" / "README.md").write_text("# A card\n")
    assert run_script(["--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    stored = {}
    for file in (tmp_path / "in").glob("*.safetensors"):
        stored |= load_file(file)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.tobytes() for n, t in written.items()} == {n: t.tobytes() for n, t in stored.items()}
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"


def test_type_is_chosen_and_unknown_fields_stay(golden_dir: Path, tmp_path: Path, run_script) -> None:
    arguments = ["--source", str(golden_dir / "target"), "--output", str(tmp_path), "--dtype", "bfloat16"]
    assert run_script(arguments) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((golden_dir / "target" / "config.json").read_text())
    assert config == original | {"torch_dtype": "bfloat16"}
    assert {str(t.dtype) for t in load_file(tmp_path / "model.safetensors").values()} == {"bfloat16"}


def test_errors_are_sentences(golden_dir: Path, tmp_path: Path, run_script, capsys) -> None:
    assert run_script(["--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "convert_checkpoint: cannot read" in capsys.readouterr().err
    target = str(golden_dir / "target")
    assert run_script(["--source", target, "--output", target]) == 2
    assert "is the source itself; give another directory" in capsys.readouterr().err
