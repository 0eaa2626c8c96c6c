"""Anchors of a training sequence and the blocks that hang on them.

A loss mask and a PRNG key come in; anchor positions of static shape and, for each block, its tokens, labels, weights
and the tokens the head's GRU reads come out. All blocks of a sequence are trained in one pass; which positions a block
may see is decided by the backbone from the anchor's position alone.

Source: Domino, arXiv 2605.29707; sampling and weights as in `OnlineDominoModel` of sgl-project/SpecForge.
"""

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.config import DraftConfig
from domino_jax.shapes import Array, Bool, Float, Int, Shaped


@flax.struct.dataclass
class Blocks:
    """Every block of a batch, slot by slot.

    Attributes:
        token_ids: the backbone's input: the anchor's token, then mask tokens; mask tokens only in a dropped block.
        labels: token each slot predicts; the last token of the row where that lies past its end (weight 0).
        weights: slot weights with decay; 0 in dropped blocks, past the end and in holes of the loss mask.
        is_scored: `weights` without the decay, as 0 and 1; the mask of every metric.
        teacher_ids: the anchor's token and the ones after it, as the GRU reads them.
    """

    token_ids: Int[Array, "*blocks P"]
    labels: Int[Array, "*blocks P"]
    weights: Float[Array, "*blocks P"]
    is_scored: Float[Array, "*blocks P"]
    teacher_ids: Int[Array, "*blocks P"]


def find_candidates(loss_mask: Float[Array, "*batch S"]) -> Bool[Array, "*batch S"]:
    """Return True where a position and the next one both carry loss; only there may an anchor lie."""
    is_learned = loss_mask > 0.5
    after = jnp.concatenate([is_learned[..., 1:], jnp.zeros_like(is_learned[..., :1])], axis=-1)
    return is_learned & after


def choose_anchors(
    key: Array, loss_mask: Float[Array, " S"], num_anchors: int
) -> tuple[Int[Array, " A"], Bool[Array, " A"]]:
    """Draw anchors of one sequence uniformly without replacement from its candidates.

    Positions come sorted. Where candidates are fewer than `num_anchors`, all of them are taken and the remaining
    blocks are dropped: position 0 and False in the second result.
    """
    length = loss_mask.shape[0]
    is_candidate = find_candidates(loss_mask)
    priority = jnp.where(is_candidate, jax.random.uniform(key, (length,)), 2.0)
    chosen = jnp.argsort(priority)[: min(num_anchors, length)]
    positions = jnp.sort(jnp.where(is_candidate[chosen], chosen, length))
    positions = jnp.pad(positions, (0, num_anchors - positions.shape[0]), constant_values=length)
    keep_mask = positions < length
    return jnp.where(keep_mask, positions, 0).astype(jnp.int32), keep_mask


def slot_decay(draft_config: DraftConfig, gamma: float) -> Float[Array, " P"]:
    """Return the weight of each slot of a complete block: exp(-i / gamma) for drafted token i, 0 for an unused slot.

    `gamma` 0 switches the decay off.
    """
    drafted = jnp.arange(draft_config.block_size) - (0 if draft_config.shift_label else 1)
    decay = jnp.exp(-drafted / gamma) if gamma > 0 else jnp.ones(draft_config.block_size)
    return jnp.where(drafted >= 0, decay, 0.0).astype(jnp.float32)


def gather_rows(rows: Shaped[Array, "B S *rest"], positions: Int[Array, "B *at"]) -> Shaped[Array, "B *out"]:
    """Return each row's values at its own positions; a position past the row's end reads its last value."""
    return jax.vmap(lambda row, at: row[at])(rows, jnp.minimum(positions, rows.shape[1] - 1))


def build_blocks(
    draft_config: DraftConfig,
    input_ids: Int[Array, "B S"],
    loss_mask: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    anchor_pos: Int[Array, "B A"],
    keep_mask: Bool[Array, "B A"],
    gamma: float,
) -> Blocks:
    """Return tokens, labels and weights of the blocks at given anchors.

    `lengths` counts the tokens of a row that are not padding; `gamma` is the decay of `slot_decay`.
    """
    slots = jnp.arange(draft_config.block_size)
    token_pos = anchor_pos[..., None] + slots
    label_pos = token_pos + 1 if draft_config.shift_label else token_pos
    teacher_ids = gather_rows(input_ids, token_pos)
    has_label = (slots >= (0 if draft_config.shift_label else 1)) & keep_mask[..., None]
    has_label &= label_pos < lengths[:, None, None]
    is_scored = jnp.where(has_label & (gather_rows(loss_mask, label_pos) > 0.5), 1.0, 0.0)
    is_anchor = (slots == 0) & keep_mask[..., None]
    return Blocks(
        token_ids=jnp.where(is_anchor, teacher_ids, draft_config.mask_token_id),
        labels=gather_rows(input_ids, label_pos),
        weights=is_scored * slot_decay(draft_config, gamma),
        is_scored=is_scored,
        teacher_ids=teacher_ids,
    )
