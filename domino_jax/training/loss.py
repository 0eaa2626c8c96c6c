"""Both losses of a drafter and its teacher-forced metrics, as sums over a batch.

    loss = (1 - lambda) * ((1 - m) * CE(corrected) + m * D(target, corrected)) + lambda * CE(base)

Each term is a mean weighted by slot; m is `ObjectiveConfig.match_weight` (0 as published), D is in `objectives`.
Sums come out instead of means, so that micro-steps are divided once by the weight of the whole batch. Logits exist
for `head_chunk` blocks at a time and are computed again in the backward pass; memory therefore does not grow with
anchors x slots x vocabulary. Logits, cross-entropies and sums are float32 whatever the activations are.

Source: Domino, arXiv 2605.29707; metric definitions as in `OnlineDominoModel` of sgl-project/SpecForge.
"""

from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from domino_jax.config import DraftConfig
from domino_jax.models.domino_head import DominoHead
from domino_jax.models.draft_backbone import DraftBackbone
from domino_jax.models.qwen3 import embed_tokens, project_to_vocabulary
from domino_jax.ops.vocabulary import choose
from domino_jax.run_config import ObjectiveConfig
from domino_jax.shapes import Array, Bool, Float, Int, Params
from domino_jax.sharding import on_own_rows
from domino_jax.training.anchors import Blocks, build_blocks, gather_rows
from domino_jax.training.objectives import accepted_support, dpace_weights, match_distance

HostOrDevice: TypeAlias = Array | np.ndarray
"""Sums are added on the device and read on the host."""


@flax.struct.dataclass
class LossSums:
    """Numerators and denominators of every loss and metric; add those of two batches field by field.

    `base_*` fields belong to the base logits, the others to the corrected ones; both are equal for a drafter without
    a head. Index i of a `*_by_slot` field is drafted token i.

    Attributes:
        loss_num: weighted sum of the cross-entropies.
        loss_den: sum of the weights; `base_loss_den` differs where the base branch has a support of its own.
        match_num: weighted sum of the distances to the target's distribution; 0 without such a term.
        correct_num: scored slots whose most likely token is the label.
        correct_den: scored slots.
        accept_num: over the blocks with a scored slot, 1 + scored slots up to the first wrong one.
        accept_den: blocks with a scored slot.
        accept_by_slot: scored slots that are right and have only right ones before them.
        scored_by_slot: scored slots.
    """

    loss_num: Float[HostOrDevice, ""]
    base_loss_num: Float[HostOrDevice, ""]
    loss_den: Float[HostOrDevice, ""]
    base_loss_den: Float[HostOrDevice, ""]
    match_num: Float[HostOrDevice, ""]
    correct_num: Float[HostOrDevice, ""]
    base_correct_num: Float[HostOrDevice, ""]
    correct_den: Float[HostOrDevice, ""]
    accept_num: Float[HostOrDevice, ""]
    base_accept_num: Float[HostOrDevice, ""]
    accept_den: Float[HostOrDevice, ""]
    accept_by_slot: Float[HostOrDevice, " slots"]
    base_accept_by_slot: Float[HostOrDevice, " slots"]
    scored_by_slot: Float[HostOrDevice, " slots"]


def zero_sums(draft_config: DraftConfig) -> LossSums:
    """Return the sums over no block at all."""
    zero, slots = jnp.zeros(()), jnp.zeros(draft_config.num_draft_tokens())
    return LossSums(*([zero] * 11), *([slots] * 3))


def add_sums(first: LossSums, second: LossSums) -> LossSums:
    """Return the sums over two disjoint sets of blocks."""
    return jax.tree.map(jnp.add, first, second)


def mix_losses(
    objective: ObjectiveConfig, sums: LossSums, base_weight: Float[Array, ""] | float
) -> list[tuple[Float[Array, ""], Float[Array, ""]]]:
    """Return the loss as (numerator, denominator) parts: it is the sum of their quotients.

    Parts of the same denominator come as one. Gradients are taken of the numerators; denominators are counts.
    """
    corrected, match = sums.loss_num, objective.match_weight
    if objective.match != "none":
        corrected = (1 - match) * corrected + match * sums.match_num
    if objective.base_support == "block":
        return [((1 - base_weight) * corrected + base_weight * sums.base_loss_num, sums.loss_den)]
    return [((1 - base_weight) * corrected, sums.loss_den), (base_weight * sums.base_loss_num, sums.base_loss_den)]


def divide_or_zero(numerator: Float[Array, "*any"], denominator: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return the quotient, 0 where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)


def compute_metrics(
    objective: ObjectiveConfig, sums: LossSums, base_weight: Float[Array, ""] | float
) -> dict[str, Array]:
    """Return losses, accuracies and acceptance from sums; 0 where nothing was scored.

    `loss` is what is minimised, `corrected_loss` and `base_loss` are cross-entropies, `match_loss` the distance to the
    target's distribution where the objective has one.

    `accept_len` is the teacher-forced accepted prefix + 1, the mean over blocks. `accept_rate_by_slot` is the share
    of blocks whose drafted token i is reached and right. Keys that start with `base_` belong to the base logits.
    """

    divide = divide_or_zero
    match = {} if objective.match == "none" else {"match_loss": divide(sums.match_num, sums.loss_den)}
    return match | {
        "loss": sum(divide(*part) for part in mix_losses(objective, sums, base_weight)),
        "corrected_loss": divide(sums.loss_num, sums.loss_den),
        "base_loss": divide(sums.base_loss_num, sums.base_loss_den),
        "accuracy": divide(sums.correct_num, sums.correct_den),
        "base_accuracy": divide(sums.base_correct_num, sums.correct_den),
        "accept_len": divide(sums.accept_num, sums.accept_den),
        "base_accept_len": divide(sums.base_accept_num, sums.accept_den),
        "accept_rate_by_slot": divide(sums.accept_by_slot, sums.scored_by_slot),
        "base_accept_rate_by_slot": divide(sums.base_accept_by_slot, sums.scored_by_slot),
    }


def draft_logits(
    draft_config: DraftConfig,
    draft_params: Params,
    embedding: Float[Array, "V D"],
    head: Float[Array, "V D"],
    hidden: Float[Array, "blocks P D"],
    teacher_ids: Int[Array, "blocks P"],
) -> tuple[Float[Array, "blocks slots V"], Float[Array, "blocks slots V"]]:
    """Return corrected and base logits of every drafted token, the GRU reading the tokens given.

    Drafted token i is slot i with `shift_label` and slot i + 1 without; in both layouts it is corrected with the
    GRU's state after i + 1 tokens, and the first `pure_draft_prefix_len` ones are not corrected.
    """
    num_drafted = draft_config.num_draft_tokens()
    hidden = hidden[:, -num_drafted:]
    base = project_to_vocabulary(hidden, head)
    first = min(draft_config.pure_draft_prefix_len, num_drafted)
    if not draft_config.has_head or first == num_drafted:
        return base, base
    module, variables = DominoHead(draft_config, hidden.dtype), {"params": draft_params["head"]}
    inputs = jax.lax.stop_gradient(embed_tokens(embedding, teacher_ids[:, :num_drafted], embedding.dtype))
    states = module.apply(variables, inputs, method="teacher_states")
    residual = module.apply(variables, hidden[:, first:], states[:, first:], method="correct")
    return jnp.concatenate([base[:, :first], base[:, first:] + residual], axis=1), base


def _cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross-entropy of every slot, and 1.0 where its most likely token is the label."""
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    is_right = (choose(logits) == labels).astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - label_logits, is_right


def _weighted_sum(weights: Array, values: Array) -> Array:
    # The weight decides, not a product with 0: a dropped block's logits may be anything.
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0))


def _count_accepted(is_right: Array, is_scored: Array) -> tuple[Array, Array, Array]:
    """Return correct count, accepted count and accepted count by slot of one kind of logits."""
    # A slot without a label neither counts nor ends the accepted prefix.
    accepted = jnp.cumprod(jnp.where(is_scored > 0, is_right, 1.0), axis=-1) * is_scored
    accept_num = jnp.sum(accepted) + jnp.sum(jnp.max(is_scored, axis=-1))
    return jnp.sum(is_right * is_scored), accept_num, jnp.sum(accepted, axis=0)


def sum_block_losses(
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    draft_params: Params,
    embedding: Float[Array, "V D"],
    head: Float[Array, "V D"],
    hidden: Float[Array, "blocks P D"],
    blocks: Blocks,
    target_hidden: Float[Array, "blocks slots D"] | None = None,
) -> LossSums:
    """Return the sums over blocks given the backbone's states; all their logits exist at once.

    The fields of `blocks` are flattened to `[blocks, P]` by the caller. `target_hidden` are the target's final-normed
    states that predict each drafted token; only a distribution-matching term needs them.
    """
    num_drafted = draft_config.num_draft_tokens()
    corrected, base = draft_logits(draft_config, draft_params, embedding, head, hidden, blocks.teacher_ids)
    target_logits = None if target_hidden is None else project_to_vocabulary(target_hidden, head)
    labels, weights, is_scored = (x[:, -num_drafted:] for x in (blocks.labels, blocks.weights, blocks.is_scored))
    return score_logits(objective, corrected, base, labels, weights, is_scored, target_logits)


def score_logits(
    objective: ObjectiveConfig,
    corrected: Float[Array, "blocks slots V"],
    base: Float[Array, "blocks slots V"],
    labels: Int[Array, "blocks slots"],
    weights: Float[Array, "blocks slots"],
    is_scored: Float[Array, "blocks slots"],
    target_logits: Float[Array, "blocks slots V"] | None = None,
) -> LossSums:
    """Return the sums over blocks given all logits of their drafted tokens; the fields of `Blocks` say what counts."""
    losses, is_right = _cross_entropy(corrected, labels)
    base_losses, base_is_right = _cross_entropy(base, labels)
    if objective.slot_weights == "dpace":
        # The corrected logits are what is served, so they say for both branches where acceptance is lost.
        weights = weights * dpace_weights(losses, is_scored, objective.dpace_alpha)
    base_weights = weights
    if objective.base_support == "accepted":
        base_weights = weights * accepted_support(base_is_right, is_scored)
    match_num = jnp.zeros(())
    if target_logits is not None:
        match_num = _weighted_sum(weights, match_distance(objective.match, target_logits, corrected, objective.lk_eta))
    correct, accept, by_slot = _count_accepted(is_right, is_scored)
    base_correct, base_accept, base_by_slot = _count_accepted(base_is_right, is_scored)
    return LossSums(
        loss_num=_weighted_sum(weights, losses),
        base_loss_num=_weighted_sum(base_weights, base_losses),
        loss_den=jnp.sum(weights),
        base_loss_den=jnp.sum(base_weights),
        match_num=match_num,
        correct_num=correct,
        base_correct_num=base_correct,
        correct_den=jnp.sum(is_scored),
        accept_num=accept,
        base_accept_num=base_accept,
        accept_den=jnp.sum(jnp.max(is_scored, axis=-1)),
        accept_by_slot=by_slot,
        base_accept_by_slot=base_by_slot,
        scored_by_slot=jnp.sum(is_scored, axis=0),
    )


def sum_in_chunks(
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    draft_params: Params,
    embedding: Float[Array, "V D"],
    head: Float[Array, "V D"],
    hidden: Float[Array, "B A P D"],
    blocks: Blocks,
    target_hidden: Float[Array, "B A slots D"] | None = None,
) -> LossSums:
    """Return `sum_block_losses` of all blocks, `head_chunk` blocks at a time, rematerialised in the backward pass.

    Where devices share the sequences each has `head_chunk` of its own blocks in a chunk.
    """
    whole = {"head": draft_params.get("head"), "embed_tokens": embedding, "lm_head": head}

    def sum_own(whole: Params, rows: tuple) -> list[Array]:
        num_blocks = rows[0].shape[0] * rows[0].shape[1]
        chunk = min(objective.head_chunk, num_blocks)
        num_chunks = -(-num_blocks // chunk)

        def split(x: Array) -> Array:
            flat = x.reshape(num_blocks, *x.shape[2:])
            padded = jnp.pad(flat, ((0, num_chunks * chunk - num_blocks),) + ((0, 0),) * (flat.ndim - 1))
            return padded.reshape(num_chunks, chunk, *flat.shape[1:])

        @jax.checkpoint
        def sum_chunk(params: Params, *inputs: Any) -> LossSums:
            embedding, head = whole["embed_tokens"], whole["lm_head"]
            return sum_block_losses(draft_config, objective, params, embedding, head, *inputs)

        def add_chunk(total: LossSums, inputs: tuple) -> tuple[LossSums, None]:
            return add_sums(total, sum_chunk({"head": whole["head"]}, *inputs)), None

        total, _ = jax.lax.scan(add_chunk, zero_sums(draft_config), jax.tree.map(split, rows))
        return [x[None] for x in jax.tree.leaves(total)]

    sums = on_own_rows(sum_own, whole, (hidden, blocks, target_hidden))
    return LossSums(*(jnp.sum(x, axis=0) for x in sums))


def block_losses(
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    draft_params: Params,
    embedding: Float[Array, "V D"],
    head: Float[Array, "V D"],
    features: Float[Array, "B S CD"],
    input_ids: Int[Array, "B S"],
    loss_mask: Float[Array, "B S"],
    lengths: Int[Array, " B"] | None,
    anchor_pos: Int[Array, "B A"],
    keep_mask: Bool[Array, "B A"],
    compute_dtype: DTypeLike = jnp.float32,
    last_hidden: Float[Array, "B S D"] | None = None,
) -> LossSums:
    """Return the sums of the losses of given anchors on given target features.

    Embedding, head, features and `last_hidden` (the target's states after its final norm, needed by a
    distribution-matching term alone) are frozen: no gradient reaches them. `lengths` None: no row is padded. A dropped
    block (`keep_mask` False) adds nothing. Read the result with `compute_metrics`.

    Raises:
        ValueError: the objective matches distributions and `last_hidden` is missing.
    """
    if lengths is None:
        lengths = jnp.full(input_ids.shape[:1], input_ids.shape[1], jnp.int32)
    embedding, head, features, last_hidden = jax.lax.stop_gradient((embedding, head, features, last_hidden))
    gamma = objective.loss_decay_gamma if objective.slot_weights == "decay" else 0.0
    blocks = build_blocks(draft_config, input_ids, loss_mask, lengths, anchor_pos, keep_mask, gamma)
    target_hidden = None
    if objective.match != "none":
        if last_hidden is None:
            raise ValueError(f"objective.match {objective.match!r} needs the target's last hidden states")
        target_hidden = gather_rows(last_hidden, anchor_pos[..., None] + jnp.arange(draft_config.num_draft_tokens()))
    backbone, variables = DraftBackbone(draft_config, jnp.dtype(compute_dtype)), {"params": draft_params["backbone"]}
    context = backbone.apply(variables, features, method="project_context")
    hidden = backbone.apply(
        variables,
        context,
        embed_tokens(embedding, blocks.token_ids, embedding.dtype),
        anchor_pos,
        objective.attention_chunk,
        method="train",
    )
    return sum_in_chunks(draft_config, objective, draft_params, embedding, head, hidden, blocks, target_hidden)
