"""What an engine is asked to hold, and the shapes that follow from it."""

from dataclasses import dataclass

import jax

from domino_jax.config import ConfigError, DraftConfig, TargetConfig, require
from domino_jax.decoding.prefill import MAX_PADDING
from domino_jax.decoding.state import DecodeSettings, default_num_candidates
from domino_jax.serving.programs import Ladders

_POSITION_STEP = 128
_SHORT_CONTEXT = 1024
_CONTEXT_FACTOR = 4


@dataclass(frozen=True)
class EngineConfig:
    """Size and manner of an engine.

    Attributes:
        max_slots: sequences that run at once.
        max_waiting: requests that may wait for a slot.
        max_model_len: tokens of prompt and output together; None: the model's context.
        block_sizes: slots of a block the engine may choose from, plain decoding (1) always among them; None: the
            drafter's own and half of it. One block size other than 1 alone, with `is_adaptive` False, is always used.
        batch_sizes: numbers of rows that are compiled, besides `max_slots`; None: as `plan_ladders` says. Fewer start
            sooner and serve light loads slower.
        is_adaptive: choose among the block sizes by load; False: always the widest.
        rounds_per_call: rounds of a device call while nobody waits for a prefill.
        prefill_tokens_per_call: prompt tokens run between two calls while others are being served.
        prefix_cache_tokens: positions of the prefix cache; None: half of the slots' own; 0: no cache.
        prefix_block_len: positions of one of its blocks.
        num_candidates: tokens a slot the head corrects; 0: all that may be drafted; None: by vocabulary.
        draft_vocab_size: tokens that may be drafted; 0: all.

    Raises:
        ConfigError: a value is out of range.
    """

    max_slots: int = 32
    max_waiting: int = 256
    max_model_len: int | None = None
    block_sizes: tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    is_adaptive: bool = True
    rounds_per_call: int = 4
    prefill_tokens_per_call: int = 256
    prefix_cache_tokens: int | None = None
    prefix_block_len: int = 16
    num_candidates: int | None = None
    draft_vocab_size: int = 0

    def __post_init__(self) -> None:
        for name in ("max_slots", "rounds_per_call", "prefill_tokens_per_call", "prefix_block_len"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be 1 or more")
        for rows in self.batch_sizes or ():
            require(
                1 <= rows <= self.max_slots, f"batch_sizes has {rows}; 1 .. max_slots ({self.max_slots}) are allowed"
            )
        require(self.max_waiting >= 0, f"max_waiting is {self.max_waiting}; it must be 0 or more")
        require(
            self.max_model_len is None or self.max_model_len >= 2,
            f"max_model_len is {self.max_model_len}; a prompt token and a new one are the least",
        )
        require(
            (self.num_candidates or 0) >= 0,
            f"num_candidates is {self.num_candidates}; give 0 for the whole vocabulary, or more",
        )
        require(
            (self.prefix_cache_tokens or 0) >= 0,
            f"prefix_cache_tokens is {self.prefix_cache_tokens}; it must be 0 (off) or more",
        )


def find_max_model_len(config: EngineConfig, target: TargetConfig) -> int:
    """Return the tokens a sequence may have.

    Raises:
        ConfigError: more are asked for than the model's context holds.
    """
    context = target.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > context:
        raise ConfigError(f"max_model_len is {config.max_model_len}; the model's context holds {context} tokens")
    return config.max_model_len or context


def find_settings(config: EngineConfig, target: TargetConfig, draft: DraftConfig | None, dtype: str) -> DecodeSettings:
    """Return what all programs of an engine have in common."""
    num_candidates = config.num_candidates
    if num_candidates is None:
        num_candidates = default_num_candidates(target.vocab_size)
    return DecodeSettings(
        target=target,
        draft=draft,
        num_candidates=num_candidates,
        draft_vocab_size=config.draft_vocab_size,
        dtype=dtype,
    )


def find_block_sizes(config: EngineConfig, draft: DraftConfig | None) -> tuple[int, ...]:
    """Return the block sizes to compile, widest first.

    Raises:
        ConfigError: one is wider than the drafter was trained for, or there is no drafter.
    """
    asked = config.block_sizes
    if draft is None:
        require(asked in (None, (1,)), f"block_sizes is {asked} but there is no drafter; name one or leave it out")
        return (1,)
    if asked is None:
        asked = (draft.block_size, draft.block_size // 2) if config.is_adaptive else (draft.block_size,)
    for size in asked:
        draft.num_draft_tokens(size)
    return tuple(sorted({size for size in asked if size > 1} | {1}, reverse=True))


def plan_ladders(config: EngineConfig, target: TargetConfig, draft: DraftConfig | None) -> Ladders:
    """Return the shapes an engine compiles.

    On a CPU a round costs almost as many times one row's as it has rows, so batches of every power of two are compiled;
    accelerators read the weights once for all rows and get every fourth power. Short contexts have one cache length,
    long ones a ladder with a factor of 4 between two.

    Raises:
        ConfigError: see `find_max_model_len` and `find_block_sizes`.
    """
    max_len = find_max_model_len(config, target)
    block_sizes = find_block_sizes(config, draft)
    width = draft.num_draft_tokens(block_sizes[0]) + 1 if draft else 1
    margin = max(width + 1, MAX_PADDING)
    longest = _round_up(max_len + margin, _POSITION_STEP)
    positions, step = [longest], _SHORT_CONTEXT
    while step * 2 <= longest:
        positions.append(step)
        step *= _CONTEXT_FACTOR
    factor = 2 if jax.default_backend() == "cpu" else 4
    rows = config.batch_sizes or [
        factor**i for i in range(config.max_slots.bit_length()) if factor**i < config.max_slots
    ]
    cached = config.prefix_cache_tokens
    if cached is None:
        cached = config.max_slots * longest // 2
    return Ladders(
        rows=tuple(sorted({*rows, config.max_slots})),
        positions=tuple(sorted(set(positions))),
        block_sizes=block_sizes,
        max_rounds=config.rounds_per_call,
        num_blocks=cached // config.prefix_block_len,
        block_len=config.prefix_block_len,
        margin=margin,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
