"""Per-row changes of the target's logits that are made before temperature and filters.

Bias, penalties on tokens seen before, and stop ids that may not come yet. Inside a drafted block a slot's penalties
count the drafts before it, as if they had been committed: where they are not, nobody looks at the slot.

Source: OpenAI API reference (bias, presence and frequency penalty); CTRL, arXiv 1909.05858 (repetition penalty); the
order bias, repetition, frequency, presence is vLLM's.
"""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.shapes import Array, Bool, Float, Int


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class Adjustment:
    """Settings and counts of each row; see `domino_jax.records.Penalties` for the meaning of the penalties.

    Attributes:
        is_used: whether the row differs from `no_adjustment` at all.
        min_len: committed length before which stop ids are banned.
        prompt_seen: tokens of the prompt.
        output_counts: how often each token stands in the output so far; kept up only where `is_used`.
    """

    is_used: Bool[Array, " B"]
    bias: Float[Array, "B V"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]
    min_len: Int[Array, " B"]
    prompt_seen: Bool[Array, "B V"]
    output_counts: Int[Array, "B V"]


def no_adjustment(batch: int, vocab_size: int) -> Adjustment:
    """Return the adjustment that changes nothing."""
    return Adjustment(
        is_used=jnp.zeros(batch, bool),
        bias=jnp.zeros((batch, vocab_size), jnp.float32),
        presence=jnp.zeros(batch, jnp.float32),
        frequency=jnp.zeros(batch, jnp.float32),
        repetition=jnp.ones(batch, jnp.float32),
        min_len=jnp.zeros(batch, jnp.int32),
        prompt_seen=jnp.zeros((batch, vocab_size), bool),
        output_counts=jnp.zeros((batch, vocab_size), jnp.int32),
    )


def adjust_block(
    logits: Float[Array, "B W V"],
    drafts: Int[Array, "B P"],
    first_pos: Int[Array, " B"],
    stop_ids: Int[Array, "B stops"],
    adjustment: Adjustment,
) -> Float[Array, "B W V"]:
    """Return the logits that choose the tokens at positions `first_pos ..`; the drafts lie at the same positions.

    Unused entries of `stop_ids` are -1.
    """
    num_slots, vocab_size = logits.shape[1:]
    rows = jnp.arange(logits.shape[0])
    banned = jnp.where(stop_ids < 0, vocab_size, stop_ids)
    is_stop = jnp.zeros(logits[:, 0].shape, bool).at[rows[:, None], banned].set(True, mode="drop")
    # The token after the last slot's own is never counted: any id will do.
    following = jnp.pad(drafts, ((0, 0), (0, num_slots - drafts.shape[1])))

    def one_slot(counts: Array, slot: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        slot_logits, token, index = slot
        adjusted = _adjust(slot_logits, counts, adjustment)
        is_early = first_pos + index < adjustment.min_len
        adjusted = jnp.where(is_early[:, None] & is_stop, -jnp.inf, adjusted)
        return counts.at[rows, token].add(1), jnp.where(adjustment.is_used[:, None], adjusted, slot_logits)

    by_slot = (jnp.swapaxes(logits, 0, 1), following.T, jnp.arange(num_slots))
    return jnp.swapaxes(jax.lax.scan(one_slot, adjustment.output_counts, by_slot)[1], 0, 1)


def _adjust(logits: Float[Array, "B V"], counts: Int[Array, "B V"], adjustment: Adjustment) -> Float[Array, "B V"]:
    biased = logits + adjustment.bias
    factor = adjustment.repetition[:, None]
    repeated = jnp.where(biased > 0, biased / factor, biased * factor)
    penalised = jnp.where(adjustment.prompt_seen | (counts > 0), repeated, biased)
    penalised -= adjustment.frequency[:, None] * counts
    return penalised - adjustment.presence[:, None] * (counts > 0)


def count_tokens(adjustment: Adjustment, new_tokens: Int[Array, "B W"], num_new: Int[Array, " B"]) -> Adjustment:
    """Return the adjustment with the first `num_new` tokens of each row counted as output."""
    rows = jnp.arange(new_tokens.shape[0])[:, None]
    is_new = jnp.arange(new_tokens.shape[1]) < num_new[:, None]
    at = jnp.where(is_new, new_tokens, adjustment.output_counts.shape[1])
    return adjustment.replace(output_counts=adjustment.output_counts.at[rows, at].add(1, mode="drop"))
