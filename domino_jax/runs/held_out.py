"""Held-out prompts, and tau from decoding them for real.

Teacher-forced accuracy can be high while serving is broken; only a decode through the real loop counts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from domino_jax.checkpoints.fingerprint import hash_json
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation.metrics import committed_lengths, decoded_tokens, tau_over_prompts, tau_over_rounds
from domino_jax.records import Generation


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts nothing was trained on, ready to decode.

    Attributes:
        prompt_ids: with the generation prompt at the end.
        line_nos: 1-based line of the file each prompt comes from.
        stop_ids: ids that end a text.
        max_new_tokens: token budget of each prompt.
    """

    prompt_ids: list[list[int]]
    line_nos: list[int]
    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def fingerprint(self) -> str:
        """Return a short hash: two values of tau can be compared where theirs is the same."""
        return hash_json(asdict(self))


def decode_held_out(decoder: Decoder, held_out: HeldOutPrompts, use_head: bool, batch_size: int) -> list[Generation]:
    """Decode the prompts greedily with the trained block width."""
    return decoder.generate(
        held_out.prompt_ids,
        held_out.max_new_tokens,
        stop_ids=held_out.stop_ids,
        use_head=use_head,
        batch_size=min(batch_size, len(held_out.prompt_ids)),
    )


def tokens_by_round(generations: Sequence[Generation]) -> list[list[int]]:
    """Return the tokens each round of each generation committed."""
    return [committed_lengths(g.stats.acceptance_lengths, decoded_tokens(g.output_ids)) for g in generations]


def measure_tau(decoder: Decoder, held_out: HeldOutPrompts, batch_size: int) -> dict[str, float]:
    """Return greedy tau with the head on and, where the drafter has one, off; both ways of taking the mean.

    Keys: `tau` and `tau_head_off` (mean over prompts), `tau_rounds` and `tau_rounds_head_off` (mean over rounds).
    They are 0 where no prompt needed a round.
    """
    has_head = decoder.settings.draft is not None and decoder.settings.draft.has_head
    values: dict[str, float] = {}
    for use_head in (True, False) if has_head else (True,):
        lengths = tokens_by_round(decode_held_out(decoder, held_out, use_head, batch_size))
        suffix = "" if use_head else "_head_off"
        values[f"tau{suffix}"] = tau_over_prompts(lengths) or 0.0
        values[f"tau_rounds{suffix}"] = tau_over_rounds(lengths) or 0.0
    return values
