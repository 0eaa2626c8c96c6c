"""The pages' tables are those of their rows and formulas, and rows are what the plan says."""

import importlib
import json
from dataclasses import replace

import jax
import pytest

from domino_jax.config import TargetConfig
from domino_jax.runs.topologies import DeviceKind, Topology

TINY = TargetConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def load(repository):
    """Return a module of `benchmarks/`, which import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module


def between(page, name):
    text = page.read_text(encoding="utf-8")
    return text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].strip()


def test_the_page_has_the_rows_of_the_folder(repository, load):
    rows = (repository / "benchmarks/2026-11-26-plans/rows.jsonl").read_text(encoding="utf-8").splitlines()
    table = load("plan_table").format_table([json.loads(row) for row in rows])
    assert table.count("\n") >= 3
    assert between(repository / "docs/scaling.md", "plans") == table


def test_the_page_has_what_the_estimate_computes(repository, load):
    estimate = load("scaling_estimate")
    assert between(repository / "docs/scaling.md", "estimate") == estimate.format_tables(estimate.parse_arguments([]))


@pytest.mark.slow
def test_a_row_has_weights_and_operations_of_a_step(load, monkeypatch):
    plan_table = load("plan_table")
    kind = DeviceKind(16 * 2**30, 1e9, 1e12)
    monkeypatch.setattr(plan_table, "find_topology", lambda name: Topology(name, "cpu", kind, jax.devices()[:1]))
    monkeypatch.setattr(plan_table, "PUBLIC_TARGETS", {"tiny": TINY})
    original = plan_table.parse_config

    def parse_small(arguments):
        run = original(arguments)
        small = {"num_hidden_layers": 1, "block_size": 4, "gru_hidden_dim": 8, "emb_dim": 4, "mask_token_id": 511}
        return replace(
            run,
            draft=replace(run.draft, **small),
            data=replace(run.data, max_length=64, bucket_widths=(), batch_size=2, micro_steps=1),
            objective=replace(run.objective, num_anchors=4, head_chunk=2),
        )

    monkeypatch.setattr(plan_table, "parse_config", parse_small)
    (part,) = plan_table.make_rows("tiny", "here", True)
    (shapes,) = plan_table.make_rows("tiny", "here", False)
    assert part["micro_steps"] == 2
    layer = 64 * (2 * 4 * 16 + 2 * 2 * 16 + 3 * 96)
    assert part["held_bytes"] == shapes["held_bytes"] > 2 * (4 * layer + 2 * 512 * 64)
    num_run = 2  # the draft layer reads after the second of four
    assert part["flops"] > 2 * 2 * 64 * num_run * layer
    parts = ("held_bytes", "rest_bytes", "temporary_bytes", "code_bytes")
    assert part["total_bytes"] == sum(part[name] for name in parts) and part["fits"]
    assert "temporary_bytes" not in shapes
    table = plan_table.format_table([part, shapes | {"topology": "there"}])
    assert "+ ? GiB" in table and "shapes alone" in table and "| yes |" in table


def test_ring_exchange(load):
    estimate = load("scaling_estimate")
    fleet = replace(estimate.FLEETS["h200"], link=100.0, network=10.0, group=8)
    assert estimate.reduce_seconds(fleet, 1, 800.0) == 0
    assert estimate.reduce_seconds(fleet, 8, 800.0) == pytest.approx(2 * 800 * 7 / 8 / 100)
    assert estimate.reduce_seconds(fleet, 16, 800.0) == pytest.approx(14 + 2 * 100 * 0.5 / 10)
    assert estimate.gather_seconds(fleet, 8, 800.0) == pytest.approx(7)


def test_prices(load, capsys):
    estimate = load("scaling_estimate")
    text = estimate.format_tables(estimate.parse_arguments(["--price", "v5p=2"]))
    row = next(line for line in text.splitlines() if line.startswith("| v5p"))
    hours, dollars = (float(cell.replace(",", "")) for cell in row.strip("| ").split(" | ")[-2:])
    assert dollars == pytest.approx(2 * hours, abs=1)
    with pytest.raises(SystemExit):
        estimate.parse_arguments(["--price", "v9=2"])
    assert "give KIND=DOLLARS, with one of h100, h200, v5e, v5p, v6e" in capsys.readouterr().err


def test_a_page_without_markers_is_refused(load, tmp_path):
    (tmp_path / "page.md").write_text("# A page\n")
    with pytest.raises(SystemExit, match=r"has no <!-- plans:begin -->"):
        load("plan_table").write_between(tmp_path / "page.md", "plans", "text")
