"""The benchmark of the training step: its dense version computes the same, its table follows from its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training_throughput import attend_dense, attention_of_variant, main, tabulate_steps
from domino_jax.models import draft_backbone
from domino_jax.ops.attention import attend_blocks


def test_dense_attention_equals_ours():
    generator = np.random.default_rng(0)
    shapes = [(2, 5, 3, 4, 8), (2, 2, 8, 11), (2, 2, 11, 8), (2, 5, 3, 2, 8), (2, 5, 3, 2, 8)]
    arrays = [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]
    anchor_pos = jnp.asarray([[1, 3, 4, 11, 0], [2, 5, 8, 9, 10]])
    dense, ours = (jax.jit(f, static_argnums=6)(*arrays, anchor_pos, 2) for f in (attend_dense, attend_blocks))
    np.testing.assert_allclose(dense, ours, rtol=1e-5, atol=1e-5)


def test_only_the_dense_variant_is_traced_with_dense_attention():
    with attention_of_variant("dense"):
        assert draft_backbone.attend_blocks is attend_dense
    with attention_of_variant("padded"):
        assert draft_backbone.attend_blocks is attend_blocks


def test_table_weighs_widths_by_their_share_and_takes_ratios_within_a_repeat():
    def step(repeat, variant, width, seconds):
        return {"kind": "step", "repeat": repeat, "variant": variant, "width": width, "seconds": seconds}

    about = {"kind": "data", "max_length": 8, "shares": {"4": 0.75, "8": 0.25}, "learned_tokens_per_step": 10.0}
    sizes = {"temp_bytes": 2e6, "peak_rss_bytes": 3e6, "compile_s": 4.0}
    compiled = [
        {"kind": "compiled", "variant": variant, "width": width, **sizes}
        for variant, width in (("bucketed", 4), ("bucketed", 8), ("padded", 8), ("dense", 8))
    ]
    # The second repeat is three times as slow, the third twice: ratios stay, rates are those of the median.
    steps = [
        step(repeat, variant, width, slowness * seconds)
        for repeat, slowness in enumerate((1, 3, 2))
        for variant, width, seconds in (("bucketed", 4, 0.2), ("bucketed", 8, 1.0), ("padded", 8, 1.0), ("dense", 8, 2))
    ]
    rows = tabulate_steps([about, *compiled, *steps]).splitlines()[2:]
    assert rows[0].startswith("| dense | 8 (100%) | 0.25 | 2 | 1.00 (1.00 to 1.00) | 2 | 3 | 4 |")
    assert rows[1].startswith("| padded | 8 (100%) | 0.50 | 5 | 2.00 (2.00 to 2.00)")
    assert rows[2] == "| bucketed | 4 (75%), 8 (25%) | 1.25 | 12 | 5.00 (5.00 to 5.00) | 2 | 3 | 8 |"


@pytest.mark.parametrize(
    "arguments", [["--setting", "tiny"], ["--setting", "large", "--run", "x"], ["--setting", "large", "--repeats", "0"]]
)
def test_what_would_be_ignored_is_refused(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["training_throughput.py", *arguments, "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--run" in capsys.readouterr().err.splitlines()[-1] or "0" in arguments
