"""What a round is made of: seconds, bytes and operations of each phase, beside what the machine can do.

Phases are timed one by one, each as a compiled loop over itself at a given batch and context, with caches of random
numbers (what lies in them does not change how long a phase takes); the whole round and the plain step are timed in the
loops that serve. What a phase has to move and to compute is counted from the shapes: every weight it uses once, the
cache it attends to, the logits it writes or reads. Knows no files.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.config import SamplingConfig, require
from domino_jax.decoding.generate import init_state
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.prefill import CHUNK_LENGTHS, prefill_chunk
from domino_jax.decoding.rollout import Proposal, choose_block
from domino_jax.decoding.speculative import (
    commit_block,
    decode_speculative,
    draft_states,
    project_to_choices,
    read_block,
    write_features,
)
from domino_jax.decoding.state import DecodeSettings, DecodeState, ModelParams
from domino_jax.ops import cpu_kernels
from domino_jax.ops.kv_cache import KVCache
from domino_jax.ops.precision import in_full_precision
from domino_jax.shapes import Array, Float, Int

PHASES = ("backbone", "LM head", "Domino head", "verify", "context projection", "commit")
"""The phases of a round, in their order."""

_LOOP_LEN = 16
"""Times a phase runs in one call: launching the call itself weighs nothing then."""


@dataclass(frozen=True)
class MachineRates:
    """What this device reaches on two plain tasks: a copy (read and written bytes) and one large matrix product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class PhaseCost:
    """One phase at one batch and context.

    Attributes:
        phase: one of `PHASES`, or `prefill` (a chunk), `plain step`, `round`, `loop and host` (a round less phases).
        seconds: median over the repeats.
        num_bytes: bytes it cannot avoid to move; 0 where nothing is counted.
        num_flops: multiplications and additions of its matrix products.
    """

    phase: str
    batch: int
    context: int
    block_size: int
    seconds: float
    num_bytes: int
    num_flops: int

    def to_row(
        self, rates: MachineRates, settings: DecodeSettings, weight_types: dict[str, str | None]
    ) -> dict[str, Any]:
        """Return a JSON-ready row with the shares of the machine's rates that the phase reaches."""
        return asdict(self) | {
            "bandwidth_share": self.num_bytes / self.seconds / rates.bytes_per_s,
            "flops_share": self.num_flops / self.seconds / rates.flops_per_s,
            "dtype": settings.dtype,
            **weight_types,
            "num_candidates": settings.num_candidates,
            "draft_vocab_size": settings.draft_vocab_size,
            "cpu_kernels": cpu_kernels.has_kernels_for(settings.dtype),
            "device": jax.devices()[0].device_kind,
        }


def measure_rates(dtype: str, copy_bytes: int = 1 << 28, matrix_size: int = 2048, repeats: int = 7) -> MachineRates:
    """Time a copy of `copy_bytes` and the product of two square matrices of `matrix_size`."""
    # In place, because a fresh result would pay for its pages, and several times a call, which is then nothing.
    num_times = 8
    box = [jax.random.normal(jax.random.key(0), (copy_bytes // 4,))]
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, num_times, lambda _, y: y * 1.0001, x), donate_argnums=0)

    def run_copy() -> Any:
        box[0] = copy(box[0])
        return box[0]

    x, weight = (jax.random.normal(jax.random.key(i), (matrix_size, matrix_size)).astype(dtype) for i in (1, 2))
    weight = weight * jnp.asarray(matrix_size**-0.5, dtype)  # keeps the size of what is multiplied again and again
    multiply = jax.jit(in_full_precision(lambda x, w: jax.lax.fori_loop(0, num_times, lambda _, y: y @ w, x)))
    copy_s = _median_seconds(run_copy, repeats) / num_times
    multiply_s = _median_seconds(lambda: multiply(x, weight), repeats) / num_times
    return MachineRates(2 * copy_bytes / copy_s, 2 * matrix_size**3 / multiply_s)


def _median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call, after one that does not count."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return median(seconds)


@flax.struct.dataclass
class _Carry:
    """What phases hand to one another in a round."""

    state: DecodeState
    hidden: Float[Array, "B P D"]
    base_logits: Float[Array, "B P U"]
    drafts: Int[Array, "B P"]
    logits: Float[Array, "B W V"]
    features: Float[Array, "B W CD"]


# Each phase reads something of its own last result, in a way the compiler cannot see through: a loop over it can
# neither leave it out nor do it once.


def _nan_to_one(x: Array) -> Array:
    return jnp.isnan(jnp.max(x)).astype(jnp.int32)


def _run_backbone(settings: DecodeSettings, params: ModelParams, carry: _Carry) -> _Carry:
    hidden, _ = draft_states(settings, params, carry.state)
    tokens = carry.state.tokens + _nan_to_one(hidden)
    return carry.replace(hidden=hidden, state=carry.state.replace(tokens=tokens))


def _run_lm_head(settings: DecodeSettings, params: ModelParams, carry: _Carry) -> _Carry:
    hidden = carry.hidden + _nan_to_one(carry.base_logits[..., :1]).astype(carry.hidden.dtype)
    return carry.replace(hidden=hidden, base_logits=project_to_choices(params, hidden))


def _run_domino_head(settings: DecodeSettings, params: ModelParams, carry: _Carry) -> _Carry:
    anchors = carry.drafts[:, 0]
    hidden = carry.hidden + (anchors < 0)[:, None, None].astype(carry.hidden.dtype)
    proposal = choose_block(settings, params, carry.state, hidden, carry.base_logits, anchors)
    return carry.replace(drafts=proposal.tokens)


def _run_verify(settings: DecodeSettings, params: ModelParams, carry: _Carry) -> _Carry:
    logits, output = read_block(settings, params, carry.state, carry.drafts)
    drafts = carry.drafts + _nan_to_one(output.features)
    state = carry.state.replace(target_cache=output.cache)
    return carry.replace(state=state, logits=logits, features=output.features, drafts=drafts)


def _run_context(settings: DecodeSettings, params: ModelParams, carry: _Carry) -> _Carry:
    state = carry.state
    features = carry.features + _nan_to_one(state.draft_cache.keys[0][:, 0, 0, 0]).astype(carry.features.dtype)
    draft_cache = write_features(settings, params, features, state.anchor_pos, state.draft_cache)
    return carry.replace(state=state.replace(draft_cache=draft_cache))


def _run_commit(settings: DecodeSettings, params: ModelParams, carry: _Carry) -> _Carry:
    logits = carry.logits + (carry.state.committed_len < 0)[:, None, None].astype(jnp.float32)
    return carry.replace(state=commit_block(settings, carry.state, Proposal(carry.drafts, None), logits))


_RUNNERS = dict(
    zip(
        PHASES,
        (_run_backbone, _run_lm_head, _run_domino_head, _run_verify, _run_context, _run_commit),
        strict=True,
    )
)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
@in_full_precision
def _repeat_phase(settings: DecodeSettings, phase: str, params: ModelParams, carry: _Carry) -> _Carry:
    run = _RUNNERS[phase]
    return jax.lax.fori_loop(0, _LOOP_LEN, lambda _, c: run(settings, params, c), carry)


def check_contexts(settings: DecodeSettings, contexts: Sequence[int]) -> None:
    """Check that rounds can be timed after so many tokens.

    Raises:
        ConfigError: a context leaves no room for a few rounds in the target's.
    """
    room = settings.target.max_position_embeddings - 2 * _LOOP_LEN
    for context in contexts:
        require(1 <= context <= room, f"a context of {context} tokens cannot be timed; 1 .. {room} fit the target")


def measure_round(
    settings: DecodeSettings, params: ModelParams, batch: int, context: int, repeats: int = 5
) -> list[PhaseCost]:
    """Time a round of greedy decoding, its phases, the plain step and a prefill chunk for rows of `context` tokens.

    Raises:
        ConfigError: see `check_contexts`.
    """
    check_contexts(settings, [context])
    plain = replace(settings, draft=None, block_size=1, rule="greedy")
    settings = replace(settings, rule="greedy", has_filters=False)
    costs = [_measure_plain(plain, ModelParams(params.target), batch, context, repeats)]
    state = random_state(settings, batch, context, _LOOP_LEN * (settings.num_draft_tokens + 1))
    round_s, state = _time_rounds(settings, params, state, context, repeats)
    prefill_s, state = _time_prefill(settings, params, state, repeats)
    carry, phase_s = _random_carry(settings, state, context), {}
    for phase in PHASES:
        if phase == "Domino head" and not (settings.draft.has_head and settings.use_head):
            continue
        box = [carry]

        def run(phase: str = phase, box: list = box) -> Any:
            box[0] = _repeat_phase(settings, phase, params, box[0])
            return box[0].drafts, box[0].state.committed_len, box[0].hidden, box[0].features

        phase_s[phase] = _median_seconds(run, repeats) / _LOOP_LEN
        carry = box[0]
    phase_s["loop and host"] = round_s - sum(phase_s.values())
    phase_s |= {"round": round_s, "prefill": prefill_s}
    work = count_work(settings, batch, context, params.weight_types)
    return costs + [
        PhaseCost(phase, batch, context, settings.block_size, seconds, *work.get(phase, (0, 0)))
        for phase, seconds in phase_s.items()
    ]


def _random_like(tree: KVCache, key: Array) -> KVCache:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def random_state(settings: DecodeSettings, batch: int, context: int, num_new: int) -> DecodeState:
    """Return the state of greedy rows of `context` tokens with a budget of `num_new`; caches hold random numbers."""
    prompt = [1 + i % (settings.target.vocab_size - 1) for i in range(context)]
    sampling, stops = [SamplingConfig()] * batch, [()] * batch
    state = init_state(settings, [prompt] * batch, [num_new] * batch, sampling, stops)
    state = state.replace(target_cache=_random_like(state.target_cache, jax.random.key(2)))
    if settings.draft:
        state = state.replace(draft_cache=_random_like(state.draft_cache, jax.random.key(3)))
    return state


def _random_carry(settings: DecodeSettings, state: DecodeState, context: int) -> _Carry:
    batch, drafts, draft = state.committed_len.shape[0], settings.num_draft_tokens, settings.draft
    keys, dtype = jax.random.split(jax.random.key(4), 5), jnp.dtype(settings.dtype)
    width, vocab = draft.hidden_size, draft.vocab_size
    return _Carry(
        state=rewind(state, context),
        hidden=jax.random.normal(keys[0], (batch, drafts, width), dtype),
        base_logits=jax.random.normal(keys[1], (batch, drafts, settings.num_choices)),
        drafts=jax.random.randint(keys[2], (batch, drafts), 0, vocab, jnp.int32),
        logits=jax.random.normal(keys[3], (batch, drafts + 1, vocab)),
        features=jax.random.normal(keys[4], (batch, drafts + 1, width * len(draft.target_layer_ids)), dtype),
    )


def rewind(state: DecodeState, context: int) -> DecodeState:
    """Return a state whose rows have `context` tokens and run again."""
    return state.replace(
        committed_len=jnp.full_like(state.committed_len, context),
        is_done=jnp.zeros_like(state.is_done),
        num_rounds=jnp.zeros_like(state.num_rounds),
    )


def _measure_plain(settings: DecodeSettings, params: ModelParams, batch: int, context: int, repeats: int) -> PhaseCost:
    num_steps = 2 * _LOOP_LEN
    box = [random_state(settings, batch, context, num_steps)]

    def run() -> Any:
        box[0] = decode_plain(settings, params, rewind(box[0], context))
        return box[0].tokens

    seconds = _median_seconds(run, repeats) / num_steps
    work = count_target_work(settings, batch, context, 1, params.weight_types)
    return PhaseCost("plain step", batch, context, 1, seconds, *work)


def _time_rounds(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, context: int, repeats: int
) -> tuple[float, DecodeState]:
    """Return the seconds of a round, and the state, which was donated."""
    box = [state]

    def run() -> Any:
        limit_len = jnp.full_like(box[0].limit_len, context + _LOOP_LEN)
        box[0] = decode_speculative(settings, params, rewind(box[0], context).replace(limit_len=limit_len))
        return box[0].tokens

    seconds = _median_seconds(run, repeats)
    return seconds / int(jnp.max(box[0].num_rounds)), box[0]


def _time_prefill(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, repeats: int
) -> tuple[float, DecodeState]:
    """Return the seconds of a chunk of a prompt, and the state, which was donated."""
    length = max(n for n in CHUNK_LENGTHS if n <= state.target_cache.num_positions)
    batch, width = state.committed_len.shape[0], settings.target.hidden_size
    box = [state, jnp.zeros((batch, width), settings.dtype)]

    def run() -> Any:
        box[:] = prefill_chunk(settings, params, box[0], length, jnp.asarray(0, jnp.int32), box[1])
        return box[1]

    return _median_seconds(run, repeats), box[0]


def _item_size(settings: DecodeSettings, weight_types: Mapping[str, str | None], name: str) -> int:
    return jnp.dtype(weight_types.get(name) or settings.dtype).itemsize


def count_target_work(
    settings: DecodeSettings,
    batch: int,
    context: int,
    num_tokens: int,
    weight_types: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[int, int]:
    """Return bytes and operations of a target pass over `num_tokens` a row, LM head included.

    `weight_types` are those of `ModelParams`; what it does not name is in `settings.dtype`.
    """
    target, item = settings.target, jnp.dtype(settings.dtype).itemsize
    weight_item = _item_size(settings, weight_types, "target_weights")
    weights = target.num_hidden_layers * layer_size(target) + target.vocab_size * target.hidden_size
    kv_width = target.num_key_value_heads * target.head_dim
    query_width = target.num_attention_heads * target.head_dim
    cached = 2 * target.num_hidden_layers * kv_width * context * batch
    num_bytes = weight_item * weights + item * cached + 4 * batch * num_tokens * target.vocab_size
    scores = 4 * target.num_hidden_layers * query_width * context
    return num_bytes, batch * num_tokens * (2 * weights + scores)


def layer_size(config: Any) -> int:
    """Return the weights of a decoder layer's matrices."""
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * query_width + 2 * kv_width + 3 * config.intermediate_size)


def count_work(
    settings: DecodeSettings,
    batch: int,
    context: int,
    weight_types: Mapping[str, str | None] = MappingProxyType({}),
) -> dict[str, tuple[int, int]]:
    """Return bytes and operations of every phase of a round, and of the whole round.

    `weight_types` as for `count_target_work`.
    """
    draft, item = settings.draft, jnp.dtype(settings.dtype).itemsize
    weight_item, head_item = (_item_size(settings, weight_types, n) for n in ("draft_weights", "draft_lm_head"))
    slots, drafts, vocab, width = settings.block_size, settings.num_draft_tokens, draft.vocab_size, draft.hidden_size
    kv_width, layers = draft.num_key_value_heads * draft.head_dim, draft.num_hidden_layers
    backbone = layers * layer_size(draft)
    scores = 4 * layers * draft.num_attention_heads * draft.head_dim * context
    choices = settings.num_choices
    draft_logits = 4 * batch * drafts * choices
    context_weights = width * width * len(draft.target_layer_ids) + layers * 2 * width * kv_width
    gru, rank = draft.gru_hidden_dim, draft.emb_dim
    corrected = settings.num_candidates if settings.limits_candidates else choices
    step_weights = 3 * gru * (width + gru) + rank * (gru + corrected)
    work = {
        "backbone": (
            weight_item * backbone + item * 2 * layers * kv_width * context * batch,
            batch * slots * (2 * backbone + scores),
        ),
        "LM head": (head_item * choices * width + draft_logits, 2 * batch * drafts * choices * width),
        "Domino head": (
            weight_item * (drafts * step_weights + width * rank) + draft_logits,
            2 * batch * drafts * (step_weights + width * rank),
        ),
        "verify": count_target_work(settings, batch, context, drafts + 1, weight_types),
        "context projection": (weight_item * context_weights, 2 * batch * (drafts + 1) * context_weights),
        "commit": (4 * batch * (drafts + 1) * vocab, 0),
    }
    if not (draft.has_head and settings.use_head):
        del work["Domino head"]
    work["round"] = tuple(map(sum, zip(*work.values(), strict=True)))
    return work
