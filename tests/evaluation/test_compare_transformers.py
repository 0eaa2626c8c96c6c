"""What `scripts/compare_transformers.py` refuses, before it needs torch."""

import importlib.util
import json

import pytest


@pytest.fixture
def run_script(repository, golden_dir, tmp_path):
    path = repository / "scripts" / "compare_transformers.py"
    spec = importlib.util.spec_from_file_location("compare_transformers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(line, *options):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps(line))
        command = ["--target", golden_dir / "target", "--draft", golden_dir / "draft" / "A", "--prompts", prompts]
        return module.main([*map(str, command), *map(str, options)])

    return run


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ({"prompt_ids": [1]}, ("--block-size", 99), "block size 99 is outside 1 .. 16"),
        ({"prompt_ids": [9999]}, (), "line 1 holds token id 9999"),
        ({"prompt_ids": [1]}, ("--output", "."), "rows cannot be written to ."),
    ],
)
def test_mistakes_are_one_sentence(run_script, capsys, line, options, message):
    assert run_script(line, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_transformers.py: ") and message in error and error.count("\n") == 1
