"""What a batch of sequences carries from round to round, and how new tokens are committed to it.

A row's committed length is the only truth about it: its newest token, the anchor, lies at `committed_len - 1`, the
target's cache is valid before the anchor, and so is the draft's context. Both loops commit through `commit_tokens`,
so stop ids, token budget and context limit mean the same in both.
"""

from dataclasses import dataclass
from typing import Literal, no_type_check

import flax.struct
import jax.numpy as jnp

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.models.qwen3 import head_weight
from domino_jax.ops.kv_cache import KVCache
from domino_jax.ops.sampling import SamplingParams
from domino_jax.ops.verification import first_stop, write_rows
from domino_jax.records import SOURCE_NAMES
from domino_jax.shapes import Array, Bool, Float, Int, Params

SOURCE_PROMPT, SOURCE_TARGET, SOURCE_DRAFTED, SOURCE_CORRECTED, SOURCE_BONUS = range(len(SOURCE_NAMES))


_MIN_VOCAB_TO_LIMIT, _NUM_CANDIDATES = 65536, 64


def default_num_candidates(vocab_size: int) -> int:
    """Return `DecodeSettings.num_candidates` where nobody has chosen: 64 tokens of a large vocabulary, all of a small.

    Source: at Qwen3's vocabulary tau does not change from 16 candidates on (others' measurement). On the embedded pair,
    2048 tokens and a head that does much of the work, 64 cost 2 % of tau (docs/performance.md), and the whole
    vocabulary is cheap there.
    """
    return _NUM_CANDIDATES if vocab_size >= _MIN_VOCAB_TO_LIMIT else 0


@dataclass(frozen=True)
class DecodeSettings:
    """The static side of a decoding loop; a new value compiles a new loop.

    Attributes:
        target: sizes of the target.
        draft: sizes of the drafter; None for plain decoding.
        block_size: slots drafted a round, 2 up to the trained width.
        rule: `greedy` promises that every row has temperature 0 and draws no noise.
        has_filters: whether any row uses top-k, top-p or min-p.
        use_head: False drafts from the base logits although the drafter has a head.
        num_candidates: tokens a slot the head corrects, those its base logits rank highest; 0 corrects all that may
            be drafted. The rejection rule needs the law of every token and always does the latter.
        draft_vocab_size: tokens that may be drafted, those of `ModelParams.vocabulary`; 0: all.
        dtype: name of the activation and cache type.
        verify_widths: block sizes, ascending, the last one `block_size`, among which every round chooses what it drafts
            and what it verifies of that; empty: `block_size` always.
    """

    target: TargetConfig
    draft: DraftConfig | None = None
    block_size: int = 1
    rule: Literal["greedy", "seed-exact", "rejection"] = "greedy"
    has_filters: bool = False
    use_head: bool = True
    num_candidates: int = 0
    draft_vocab_size: int = 0
    dtype: str = "float32"
    verify_widths: tuple[int, ...] = ()

    @property
    def num_draft_tokens(self) -> int:
        """Tokens drafted a round."""
        return self.draft.num_draft_tokens(self.block_size) if self.draft else 0

    @property
    def num_choices(self) -> int:
        """Tokens that a draft is chosen among."""
        return self.draft_vocab_size or self.target.vocab_size

    @property
    def limits_candidates(self) -> bool:
        """Whether the head corrects some tokens of a slot only."""
        return 0 < self.num_candidates < self.num_choices and self.rule != "rejection"


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class DraftVocabulary:
    """The tokens that may be drafted, ascending, and the target's rows of them.

    Attributes:
        token_ids: None: all; the rows are in the type of the drafter's weights then, and not the target's own.
        embed_tokens: None where nothing looks them up: without a head, and with an LM head of its own.
        lm_head: None where it is tied to the embedding.
    """

    token_ids: Int[Array, " U"] | None
    embed_tokens: Float[Array, "U D"] | None = None
    lm_head: Float[Array, "U D"] | None = None


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class ModelParams:
    """Parameters of both models; `draft` is None for plain decoding.

    Attributes:
        vocabulary: what may be drafted, where that is not all of the target's own (`decoding.draft_vocabulary`); the
            drafter's head has the columns of its tokens alone then.
    """

    target: Params
    draft: Params | None = None
    vocabulary: DraftVocabulary | None = None

    @property
    def draft_lm_head(self) -> Float[Array, "U D"]:
        """The rows of the LM head that base logits of drafts come from."""
        if self.vocabulary is None:
            return head_weight(self.target)
        return self.vocabulary.embed_tokens if self.vocabulary.lm_head is None else self.vocabulary.lm_head

    @property
    def weight_types(self) -> dict[str, str | None]:
        """The types of the weights by whose they are, as rows of measurements have them; None without a drafter."""
        draft = self.draft and self.draft["backbone"]["fc"].dtype.name
        return {
            "target_weights": self.target["layers_0"]["q_proj"].dtype.name,
            "draft_weights": draft,
            "draft_lm_head": draft and self.draft_lm_head.dtype.name,
        }


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class DecodeState:
    """Everything a batch carries; donated to each loop and returned by it.

    Attributes:
        tokens: prompt and committed tokens; entries at and past `committed_len` mean nothing.
        sources: who wrote each token, an index into `SOURCE_NAMES`.
        committed_len: known tokens of each row, the anchor included.
        limit_len: committed length at which a row ends, from its token budget and the model's context.
        stop_ids: per row, padded with -1.
        has_stopped: whether a stop id ended the row.
        is_done: whether the row takes no more part; its state is then left alone.
        acceptance_lengths: per round of a row, accepted draft tokens + 1, cut at the token budget.
        num_rounds: rounds each row took part in.
        draft_cache: None for plain decoding.
    """

    tokens: Int[Array, "B S"]
    sources: Int[Array, "B S"]
    committed_len: Int[Array, " B"]
    limit_len: Int[Array, " B"]
    stop_ids: Int[Array, "B stops"]
    has_stopped: Bool[Array, " B"]
    is_done: Bool[Array, " B"]
    acceptance_lengths: Int[Array, "B rounds"]
    num_rounds: Int[Array, " B"]
    sampling: SamplingParams
    target_cache: KVCache
    draft_cache: KVCache | None

    @property
    def anchor_pos(self) -> Int[Array, " B"]:
        """Absolute position of each row's newest token."""
        return self.committed_len - 1


def commit_tokens(
    state: DecodeState, new_tokens: Int[Array, "B W"], num_new: Int[Array, " B"], sources: Int[Array, "B W"]
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Append up to `num_new` tokens a row, exactly up to its stop token, token budget and context limit.

    Returns the state and the counts within the budget before a stop token cut them (the acceptance lengths of a
    round); 0 for rows that were done before.
    """
    within_budget = jnp.minimum(num_new, state.limit_len - state.committed_len)
    within_budget = jnp.where(state.is_done, 0, within_budget)
    kept, has_stopped = first_stop(new_tokens, within_budget, state.stop_ids)
    committed_len = state.committed_len + kept
    return (
        state.replace(
            tokens=write_rows(state.tokens, new_tokens, state.committed_len, kept),
            sources=write_rows(state.sources, sources, state.committed_len, kept),
            committed_len=committed_len,
            has_stopped=state.has_stopped | has_stopped,
            is_done=state.is_done | has_stopped | (committed_len >= state.limit_len),
        ),
        within_budget,
    )
