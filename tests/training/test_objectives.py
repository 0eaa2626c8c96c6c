"""Every choice of the objective against loops over slots in float64, values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import ConfigError
from domino_jax.run_config import ObjectiveConfig
from domino_jax.training.loss import compute_metrics, score_logits
from domino_jax.training.objectives import match_distance

BLOCKS, SLOTS, VOCAB = 5, 4, 6
BASE_WEIGHT = 0.3


def draw_case(seed=0):
    """Return three kinds of logits, labels, weights and scored slots; with a hole, a short and a dropped block."""
    generator = np.random.default_rng(seed)
    corrected, base, target = generator.normal(0, 1.5, (3, BLOCKS, SLOTS, VOCAB))
    # Labels that are mostly right, so that prefixes of every length occur.
    labels = np.where(generator.random((BLOCKS, SLOTS)) < 0.6, base.argmax(-1), corrected.argmax(-1))
    is_scored = np.ones((BLOCKS, SLOTS))
    is_scored[1, 1] = is_scored[2, 3] = 0
    is_scored[3] = 0
    return corrected, base, target, labels, is_scored * np.exp(-np.arange(SLOTS) / 3), is_scored


def softmax(logits):
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def freeze(objective, corrected, base, target, labels, weights, is_scored):
    """Return what the gradient takes for constant: weights of both branches and the share of KL, slot by slot."""
    both = np.zeros((2, BLOCKS, SLOTS))
    share = np.zeros((BLOCKS, SLOTS))
    for b in range(BLOCKS):
        alive = True
        for k in range(SLOTS):
            if not is_scored[b, k]:
                continue
            weight = weights[b, k]
            if objective.slot_weights == "dpace":
                weight *= sum(
                    np.prod(
                        [
                            (1 - objective.dpace_alpha) * softmax(corrected[b, i])[labels[b, i]] + objective.dpace_alpha
                            for i in range(m + 1)
                            if is_scored[b, i]
                        ]
                    )
                    for m in range(k, SLOTS)
                    if is_scored[b, m]
                )
            both[0, b, k] = weight
            both[1, b, k] = weight if alive or objective.base_support == "block" else 0
            alive = alive and base[b, k].argmax() == labels[b, k]
            overlap = np.minimum(softmax(corrected[b, k]), softmax(target[b, k])).sum()
            share[b, k] = np.exp(-objective.lk_eta * overlap)
    return both, share


def naive_loss(objective, frozen, corrected, base, target, labels):
    (corrected_weights, base_weights), share = frozen
    cross_entropy = distance = base_entropy = 0.0
    for b, k in itertools.product(range(BLOCKS), range(SLOTS)):
        p, q = softmax(target[b, k]), softmax(corrected[b, k])
        cross_entropy -= corrected_weights[b, k] * np.log(q[labels[b, k]])
        base_entropy -= base_weights[b, k] * np.log(softmax(base[b, k])[labels[b, k]])
        divergence, overlap = sum(p * (np.log(p) - np.log(q))), sum(np.minimum(p, q))
        distances = {
            "none": 0.0,
            "kl": divergence,
            "tv": 0.5 * sum(abs(p - q)),
            "lk-alpha": -np.log(overlap),
            "lk-hybrid": share[b, k] * divergence + (1 - share[b, k]) * (1 - overlap),
        }
        distance += corrected_weights[b, k] * distances[objective.match]
    match_weight = 0.0 if objective.match == "none" else objective.match_weight
    first = ((1 - match_weight) * cross_entropy + match_weight * distance) / corrected_weights.sum()
    return (1 - BASE_WEIGHT) * first + BASE_WEIGHT * base_entropy / base_weights.sum()


CHOICES = [
    {"slot_weights": weights, "base_support": support, "match": match}
    for weights in ("decay", "dpace")
    for support in ("block", "accepted")
    for match in ("none", "kl", "tv", "lk-alpha", "lk-hybrid")
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice.values()))
def test_value_and_gradient_are_those_of_naive_loops(choice):
    more = {"match_weight": 0.4} if choice["match"] != "none" else {}
    more |= {"dpace_alpha": 0.35} if choice["slot_weights"] == "dpace" else {}
    objective = ObjectiveConfig(**choice, **more)
    corrected, base, target, labels, weights, is_scored = draw_case()
    weights = is_scored if objective.slot_weights == "dpace" else weights
    frozen = freeze(objective, corrected, base, target, labels, weights, is_scored)

    def loss(corrected, base):
        target_logits = None if objective.match == "none" else jnp.asarray(target, jnp.float32)
        inputs = jnp.asarray(labels, jnp.int32), jnp.float32(weights), jnp.float32(is_scored), target_logits
        return compute_metrics(objective, score_logits(objective, corrected, base, *inputs), BASE_WEIGHT)["loss"]

    value, grads = jax.value_and_grad(loss, (0, 1))(jnp.float32(corrected), jnp.float32(base))
    assert float(value) == pytest.approx(naive_loss(objective, frozen, corrected, base, target, labels), rel=2e-6)
    for which, ours in enumerate(grads):
        expected = np.zeros_like(corrected)
        for at in np.ndindex(expected.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [corrected.copy(), base.copy()]
                moved[which][at] += step
                ends.append(naive_loss(objective, frozen, *moved, target, labels))
            expected[at] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-6)


def test_distances_of_equal_distributions_are_0_and_of_disjoint_ones_finite():
    same = jnp.array([[0.5, -1.0, 2.0]])
    apart = jnp.array([[200.0, 0.0, 0.0]]), jnp.array([[0.0, 200.0, 0.0]])
    for match in ("kl", "tv", "lk-alpha", "lk-hybrid"):
        assert float(match_distance(match, same, same, 3.0)[0]) == pytest.approx(0, abs=1e-6)
        value, grad = jax.value_and_grad(lambda q, match=match: match_distance(match, apart[0], q, 3.0).sum())(apart[1])
        assert np.isfinite(value)
        assert np.isfinite(grad).all()
        assert float(value) > 0.99


def test_lk_alpha_is_the_cross_entropy_for_a_certain_target():
    certain, draft = jnp.array([[0.0, 100.0, 0.0]]), jnp.array([[0.3, -0.2, 1.0]])
    expected = -jax.nn.log_softmax(draft)[0, 1]
    assert float(match_distance("lk-alpha", certain, draft, 3.0)[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("match_weight", 1.5, r"\[0, 1\]"),
        ("dpace_alpha", 0.0, "greater than 0"),
        ("lk_eta", -1.0, "greater than 0"),
    ],
)
def test_impossible_settings_are_named(field, value, allowed):
    with pytest.raises(ConfigError, match=f"{field} is {value}.*{allowed}"):
        ObjectiveConfig(**{field: value})


@pytest.mark.parametrize("shift_label", [True, False])
def test_the_targets_states_are_those_that_predict_each_drafted_token(shift_label, monkeypatch):
    """Drafted token i of an anchor a is what the target predicts at position a + i, whatever the label layout."""
    from domino_jax.config import DraftConfig
    from domino_jax.models.domino_head import init_draft_params
    from domino_jax.training import loss as loss_module

    config = DraftConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, num_target_layers=4, target_layer_ids=(2,), block_size=4, mask_token_id=0,
        shift_label=shift_label, gru_hidden_dim=4, emb_dim=2,
    )  # fmt: skip
    length, anchors = 9, np.array([[1, 4, 7]], np.int32)
    hidden = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32)[:, None], (length, 8))[None]
    seen = []

    def record(*arguments):
        seen.append(np.asarray(arguments[-1])[..., 0])
        return loss_module.zero_sums(config)

    monkeypatch.setattr(loss_module, "sum_in_chunks", record)
    loss_module.block_losses(
        config,
        ObjectiveConfig(match="kl"),
        init_draft_params(config, jax.random.key(0)),
        jnp.ones((VOCAB, 8)),
        jnp.ones((VOCAB, 8)),
        jnp.ones((1, length, 8)),
        jnp.zeros((1, length), jnp.int32),
        jnp.ones((1, length)),
        None,
        jnp.asarray(anchors),
        jnp.ones((1, 3), bool),
        last_hidden=hidden,
    )
    expected = [[min(a + i, length - 1) for i in range(config.num_draft_tokens())] for a in anchors[0]]
    np.testing.assert_array_equal(seen[0][0], expected)
