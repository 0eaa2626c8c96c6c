"""`bench.py` and `serve.py` with `--mesh`; run by `test_eight_devices.py`."""

import json

import jax
import pytest

import bench
import serve
from domino_jax.checkpoints.huggingface import save_draft, save_target
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.runs import server
from tests.decoding.tiny_pair import draw_params, make_configs, make_prompts
from tests.sharding.small_pair import make_layout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(["alpha beta gamma delta"] * 4, 280)
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4, "intermediate_size": 64}
    target, draft = make_configs(len(tokenizer), 128, 4, 3, sizes)
    save_target(root / "target", target, draw_params(init_target_params, target, 0))
    save_draft(root / "draft", draft, draw_params(init_draft_params, draft, 1))
    save_tokenizer(tokenizer, root / "target")
    prompts = make_prompts([5, 11, 7], 64)
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt_ids": prompt}) for prompt in prompts))
    return root


def measure(saved, output, *arguments):
    command = ["--target", saved / "target", "--draft", saved / "draft", "--prompts", saved / "prompts.jsonl"]
    command += ["--max-new-tokens", 8, "--batch-size", 2, "--output", output, *arguments]
    assert bench.main([*map(str, command)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_bench_measures_the_same_texts_on_a_mesh(saved, tmp_path):
    alone = measure(saved, tmp_path / "one.jsonl")
    on_mesh = measure(saved, tmp_path / "eight.jsonl", "--mesh", "data=2,model=4")
    assert len(alone) == len(on_mesh) == 3
    for one, other in zip(alone, on_mesh, strict=True):
        assert (one["mesh"], other["mesh"]) == (None, {"data": 2, "model": 4})
        for name in ("output_ids", "plain_output_ids", "acceptance_lengths", "token_sources"):
            assert one[name] == other[name], name


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("model=3", "mesh.model is 3, which does not divide the 8 devices"),
        ("data=2,model=2", "is 4 devices, there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(saved, capsys, mesh, message):
    pair = ["--target", str(saved / "target"), "--draft", str(saved / "draft"), "--mesh", mesh]
    assert bench.main([*pair, "--prompts", str(saved / "prompts.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert serve.main([*pair, "--compilation-cache", "none"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_serve_loads_both_models_onto_the_mesh(saved, capsys, monkeypatch):
    engines = []
    monkeypatch.setattr(server, "create_app", lambda engine, codec, settings: engines.append(engine))
    monkeypatch.setattr(server, "run_server", lambda app, host, port: 0)
    pair = ["--target", str(saved / "target"), "--draft", str(saved / "draft")]
    assert serve.main([*pair, "--mesh", "model=4", "--max-slots", "2", "--compilation-cache", "none"]) == 0
    assert "on each of 8 devices" in capsys.readouterr().out
    [engine] = engines
    params = engine._load_params()
    wanted = make_layout(2, 4).shardings(params)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert engine.programs.slots_shape(engine._batch.shape).decode.tokens.sharding is not None
