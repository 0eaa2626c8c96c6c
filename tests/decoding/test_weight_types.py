"""Bfloat16 weights beside float32 activations: what is kept so, what drafts come from, and the same text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.checkpoints.huggingface import find_kept, load_draft, load_target, save_draft, save_target, target_table
from domino_jax.decoding.draft_vocabulary import prepare_drafting
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.state import ModelParams
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.ops import cpu_kernels
from domino_jax.run_config import MeshConfig
from domino_jax.sharding import build_layout
from tests.decoding.test_candidates import BUDGET, PROMPTS, SAMPLINGS, acceptance
from tests.decoding.tiny_pair import VOCAB, assert_same_text, draw_params, make_configs


@pytest.fixture(autouse=True)
def kernels():
    if not cpu_kernels.has_kernels_for("float32"):
        pytest.skip("no kernels of a CPU here: weights have the type of the activations")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """Return a folder with a target and a drafter in float32 and in bfloat16."""
    root, (target, draft) = tmp_path_factory.mktemp("pair"), make_configs()
    target = replace(target, tie_word_embeddings=request.param)
    target_params, draft_params = draw_params(init_target_params, target, 0), draw_params(init_draft_params, draft, 1)
    for dtype in ("float32", "bfloat16"):
        save_target(root / f"target-{dtype}", target, target_params, dtype=dtype)
        save_draft(root / f"draft-{dtype}", draft, draft_params, dtype=dtype)
    return root


def load(pair, target_type, draft_type, keep=True, rounded=None, vocabulary=None, num_candidates=0):
    target, target_params = load_target(str(pair / f"target-{target_type}"), "float32", keep_bfloat16=keep)
    draft = load_draft(str(pair / f"draft-{draft_type}"), rounded or "float32", keep_bfloat16=keep)
    models = target, target_params, draft.config, draft.params
    return Decoder(*models, num_candidates=num_candidates, draft_vocabulary=vocabulary)


def types_of(tree, is_matrix):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if (leaf.ndim > 1) == is_matrix}


def test_stored_bfloat16_matrices_stay_so_and_are_the_same_numbers(pair):
    kept, wide = load(pair, "bfloat16", "bfloat16").params, load(pair, "bfloat16", "bfloat16", keep=False).params
    for tree in (kept.target, kept.draft):
        assert types_of(tree, is_matrix=True) == {"bfloat16"}
        assert types_of(tree, is_matrix=False) == {"float32"}
    assert types_of(wide, is_matrix=True) == {"float32"}
    for own, other in zip(jax.tree.leaves(kept), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(np.asarray(own, np.float32), other)
    assert kept.vocabulary is None
    assert kept.weight_types == dict.fromkeys(("target_weights", "draft_weights", "draft_lm_head"), "bfloat16")


@pytest.mark.parametrize("hindrance", ["float32 files", "bfloat16 activations", "mesh", "no kernels"])
def test_nothing_is_kept_where_it_would_not_be_used(pair, hindrance, monkeypatch):
    path = str(pair / ("target-float32" if hindrance == "float32 files" else "target-bfloat16"))
    dtype = "bfloat16" if hindrance == "bfloat16 activations" else "float32"
    layout = build_layout(MeshConfig(), jax.devices()[:1]) if hindrance == "mesh" else None
    if hindrance == "no kernels":
        monkeypatch.setattr(cpu_kernels, "has_kernels_for", lambda dtype: False)
    config, params = load_target(path, dtype, layout, keep_bfloat16=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert find_kept(path, target_table(config), dtype, layout) == set()


@pytest.mark.parametrize("num_candidates", [0, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_text_and_acceptance_are_those_of_the_same_weights_in_float32(pair, sampling, num_candidates):
    kept, wide = (load(pair, "bfloat16", "bfloat16", keep, num_candidates=num_candidates) for keep in (True, False))
    for block_size in (1, None):
        own, other = (d.generate(PROMPTS, BUDGET, SAMPLINGS[sampling], block_size=block_size) for d in (kept, wide))
        assert_same_text(own, other)
        assert acceptance(own) == acceptance(other)


@pytest.mark.parametrize("rule", ["seed-exact", "rejection"])
@pytest.mark.parametrize("vocabulary", [None, np.arange(0, VOCAB, 2)], ids=["all", "half"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_rounded_drafter_changes_no_text(pair, sampling, vocabulary, rule):
    usual, rounded = (load(pair, "float32", "float32", True, r, vocabulary) for r in (None, "bfloat16"))
    assert types_of(rounded.params.target, is_matrix=True) == {"float32"}
    assert types_of(rounded.params.draft, is_matrix=True) == {"bfloat16"}
    assert rounded.params.draft_lm_head.dtype == jnp.bfloat16
    assert (rounded.params.vocabulary.token_ids is None) == (vocabulary is None)
    plain, own = (
        d.generate(PROMPTS, BUDGET, SAMPLINGS[sampling], rule=rule, block_size=size)
        for d, size in ((usual, 1), (rounded, None))
    )
    promised = [i for i, row in enumerate(SAMPLINGS[sampling]) if rule == "seed-exact" or row.temperature == 0]
    assert_same_text([own[i] for i in promised], [plain[i] for i in promised])
    assert any(length > 1 for row in own for length in row.stats.acceptance_lengths)


def test_tables_are_copied_for_a_narrow_drafter_alone(pair):
    target, narrow_target = load(pair, "float32", "float32").params, load(pair, "bfloat16", "bfloat16").params
    narrow_draft = load(pair, "float32", "bfloat16").params
    for params, is_copied in [
        (ModelParams(target.target, target.draft), False),
        (ModelParams(narrow_target.target, narrow_target.draft), False),
        (ModelParams(narrow_target.target, target.draft), False),
        (ModelParams(target.target, narrow_draft.draft), True),
        (ModelParams(target.target), False),
    ]:
        prepared = prepare_drafting(params, None, "float32")
        assert (prepared.vocabulary is not None) == is_copied
    assert prepare_drafting(ModelParams(target.target, narrow_draft.draft), None, "bfloat16").vocabulary is None
