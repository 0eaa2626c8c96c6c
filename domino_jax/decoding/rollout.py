"""From the backbone's states to drafted tokens: the head's roll-out, over the vocabulary or over candidates.

The roll-out is the only sequential part of a draft, so nothing is in its loop that can be outside: the part of the
correction that depends on the slot alone, and, over candidates, everything that is indexed by a token. Candidates
of a slot are the M tokens that its base logits (with the noise they are chosen by) rank highest; a token outside them
is not drafted. That changes which tokens are proposed, never which are committed. Where only part of the vocabulary
may be drafted, everything here happens in that part, and tokens are named by their places in it until the end.

Source: Domino, arXiv 2605.29707; candidate-limited correction as in SGLang.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.decoding.state import DecodeSettings, DecodeState, ModelParams
from domino_jax.models.domino_head import DominoHead, update_state
from domino_jax.models.qwen3 import embed_tokens
from domino_jax.ops.products import cast_weight, einsum_in_float32, take_columns
from domino_jax.ops.ranking import first_argmax
from domino_jax.ops.sampling import SamplingParams, add_noise, gumbel_noise, row_probabilities, scale_and_filter
from domino_jax.ops.vocabulary import choose, choose_and_look_up, choose_top, look_up
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain, constrain_tree, gather_parameter

_MAX_GATE_ROWS = 256
"""Rows times candidates up to which an accelerator computes the gates of all candidates at once: one product that
reads the weight once, where the loop would read it once a token. A CPU is quicker with the one token that is chosen."""


@flax.struct.dataclass
class Proposal:
    """Drafted tokens of a round.

    Attributes:
        probs: the law each token was drawn from, given the ones before it; None unless the rule needs it.
        confidence: the drafter's probability of each token; under the rejection rule that of the likeliest token, which
            is known before one is drawn. None unless widths are chosen by it.
        noise: `choice_noise` of the state, which the target's own tokens are drawn with, where drafts were drawn with
            it too; None: nobody has drawn it yet.
    """

    tokens: Int[Array, "B P"]
    probs: Float[Array, "B P V"] | None
    confidence: Float[Array, "B P"] | None = None
    noise: Float[Array, "B W V"] | None = None


def choice_noise(settings: DecodeSettings, state: DecodeState) -> Float[Array, "B W V"]:
    """Return the noise of the target's own choice of each token that a round may commit."""
    positions = state.committed_len[:, None] + jnp.arange(settings.num_draft_tokens + 1)
    return gumbel_noise(state.sampling.seed, positions, settings.target.vocab_size, "choice")


def _draft_noise(settings: DecodeSettings, state: DecodeState) -> Float[Array, "B P U"]:
    positions = state.committed_len[:, None] + jnp.arange(settings.num_draft_tokens)
    return gumbel_noise(state.sampling.seed, positions, settings.num_choices, "draft")


def choose_block(
    settings: DecodeSettings,
    params: ModelParams,
    state: DecodeState,
    hidden: Float[Array, "B P D"],
    base_logits: Float[Array, "B P U"],
    anchors: Int[Array, " B"],
    noise: Float[Array, "B W V"] | None = None,
) -> Proposal:
    """Choose a block's tokens from the backbone's states and base logits.

    Under the seed-exact rule drafts are drawn with the target's own noise: `noise`, or `choice_noise` where it is None.
    """
    shared = None
    if settings.rule == "seed-exact":
        shared = choice_noise(settings, state) if noise is None else noise
        noise = shared[:, :-1]
        noise = noise if _drafts_all(params) else noise[..., params.vocabulary.token_ids]
    else:
        noise = _draft_noise(settings, state) if settings.rule == "rejection" else None
    if not (settings.draft.has_head and settings.use_head):
        proposal = _choose_drafts(settings, state.sampling, base_logits, noise)
        return _name_tokens(settings, params, proposal).replace(noise=shared)
    candidates = None
    if settings.limits_candidates:
        candidates = _find_candidates(settings, state.sampling, base_logits, noise)
        base_logits = jnp.take_along_axis(base_logits, candidates, axis=-1)
        noise = None if noise is None else jnp.take_along_axis(noise, candidates, axis=-1)
    proposal = _roll_out_head(settings, state.sampling, params, hidden, base_logits, candidates, anchors, noise)
    return _name_tokens(settings, params, proposal).replace(noise=shared)


def _drafts_all(params: ModelParams) -> bool:
    return params.vocabulary is None or params.vocabulary.token_ids is None


def _name_tokens(settings: DecodeSettings, params: ModelParams, proposal: Proposal) -> Proposal:
    """Return a proposal whose tokens are ids, and whose laws are over the vocabulary, not over what may be drafted."""
    if _drafts_all(params):
        return proposal
    token_ids, probs = params.vocabulary.token_ids, proposal.probs
    if probs is not None:
        whole = jnp.zeros((*probs.shape[:-1], settings.target.vocab_size), probs.dtype)
        probs = constrain(whole.at[..., token_ids].set(probs, indices_are_sorted=True, unique_indices=True), "logits")
    return proposal.replace(tokens=token_ids[proposal.tokens], probs=probs)


def _choose_drafts(settings: DecodeSettings, sampling: SamplingParams, logits: Array, noise: Array | None) -> Proposal:
    log_weights, values = _weigh_drafts(settings, sampling, logits, noise)
    tokens = choose(values)
    return Proposal(
        tokens, _draft_laws(settings, sampling, log_weights), _find_confidence(settings, log_weights, tokens)
    )


def _find_confidence(settings: DecodeSettings, log_weights: Float[Array, "B P U"], chosen: Array) -> Array | None:
    """Return `Proposal.confidence` of the entries `chosen` from log-weights."""
    if not settings.verify_widths:
        return None
    if settings.rule == "rejection":
        highest = jnp.max(log_weights, axis=-1)
    else:
        highest = jnp.take_along_axis(log_weights, chosen[..., None], axis=-1)[..., 0]
    return jnp.exp(highest - jax.nn.logsumexp(log_weights, axis=-1))


def _weigh_drafts(
    settings: DecodeSettings, sampling: SamplingParams, logits: Array, noise: Array | None
) -> tuple[Array, Array]:
    """Return log-weights of the laws that drafts are drawn from, and the values whose argmax they are."""
    if noise is None:
        return logits, logits
    log_weights = scale_and_filter(logits, sampling, settings.has_filters)
    return log_weights, add_noise(log_weights, sampling, noise)


def _draft_laws(settings: DecodeSettings, sampling: SamplingParams, log_weights: Array | None) -> Array | None:
    return row_probabilities(log_weights, sampling) if settings.rule == "rejection" else None


def _find_candidates(
    settings: DecodeSettings, sampling: SamplingParams, base_logits: Float[Array, "B P U"], noise: Array | None
) -> Int[Array, "B P M"]:
    if noise is None:
        return choose_top(base_logits, settings.num_candidates)
    # A filter keeps the likely tokens whatever their noise is: the rows that have one take their candidates from those.
    is_filtered = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    takes_noise = (sampling.temperature > 0) & ~is_filtered
    scaled = scale_and_filter(base_logits, sampling, has_filters=False)
    return choose_top(scaled + jnp.where(takes_noise[:, None, None], noise, 0.0), settings.num_candidates)


def _roll_out_head(
    settings: DecodeSettings,
    sampling: SamplingParams,
    params: ModelParams,
    hidden: Float[Array, "B P D"],
    base_logits: Float[Array, "B P M"],
    candidates: Int[Array, "B P M"] | None,
    anchors: Int[Array, " B"],
    noise: Float[Array, "B P M"] | None,
) -> Proposal:
    """Draft token by token; `candidates` are the tokens the logits belong to, None: all that may be drafted.

    Devices that share the vocabulary exchange a step's token and its embedding at once. With filters over the whole of
    it there is a second exchange, of the logits, which have to be sorted; gates of candidates need none at all.
    """
    dtype = jnp.dtype(settings.dtype)
    head = DominoHead(settings.draft, dtype=dtype, num_choices=settings.num_choices)
    # Whole over `data` before the loop: under fsdp each step would gather it anew.
    variables = {"params": constrain_tree({"head": params.draft["head"]})["head"]}
    embedding = params.target["embed_tokens"] if params.vocabulary is None else params.vocabulary.embed_tokens
    embedding = gather_parameter(cast_weight(embedding, dtype), "embed_tokens")
    read = partial(head.apply, variables, method=DominoHead.input_gates)
    find = partial(look_up, embedding, dtype=dtype)

    def step(carry: tuple, slot: dict) -> tuple[tuple, tuple]:
        state, state_gates, input_gates = carry
        state = update_state(state, input_gates, state_gates)
        state_gates, inner = head.apply(variables, state, method=DominoHead.project_state)
        inner = jax.nn.silu(slot["projected"] + inner)
        expand = partial(head.apply, variables, method=DominoHead.expand)
        correction = expand(inner) if candidates is None else einsum_in_float32("be,bme->bm", inner, slot["up"])
        logits = slot["logits"] + jnp.where(slot["is_corrected"], correction, 0.0)
        row_noise = None if slot["noise"] is None else slot["noise"][:, None]
        log_weights, values = _weigh_drafts(settings, sampling, logits[:, None], row_noise)
        if candidates is None:
            tokens, embeddings = choose_and_look_up(values[:, 0], embedding, dtype)
            places, input_gates = tokens, read(embeddings)
        else:
            places = first_argmax(values[:, 0])
            tokens = jnp.take_along_axis(slot["candidates"], places[:, None], axis=-1)[:, 0]
            input_gates = _gates_of_choice(slot["gates"], tokens, places, lambda ids: read(find(ids)))
        confidence = _find_confidence(settings, log_weights, places[:, None])
        law = log_weights if settings.rule == "rejection" else None
        return (state, state_gates, input_gates), (tokens, *jax.tree.map(lambda x: x[:, 0], (law, confidence)))

    slots = {
        "logits": base_logits,
        "candidates": candidates,
        "noise": noise,
        "projected": head.apply(variables, hidden, method=DominoHead.project_hidden),
        "up": None if candidates is None else take_columns(variables["params"]["up"], candidates, dtype),
        "gates": _gates_of_candidates(candidates, lambda ids: read(find(ids))),
    }
    slots = _swap_rows_and_slots(slots)
    slots["is_corrected"] = jnp.arange(base_logits.shape[1]) >= settings.draft.pure_draft_prefix_len
    state = head.apply(variables, (anchors.shape[0],), method=DominoHead.init_state)
    no_gates = jnp.zeros((anchors.shape[0], 3 * settings.draft.gru_hidden_dim), state.dtype)
    start = (state, no_gates, read(embed_tokens(params.target["embed_tokens"], anchors, dtype)))
    tokens, log_weights, confidence = _swap_rows_and_slots(_scan_slots(step, start, slots))
    return Proposal(tokens, _draft_laws(settings, sampling, log_weights), confidence)


def _scan_slots(step: Callable[[tuple, dict], tuple], start: tuple, slots: dict) -> tuple:
    """Return what every step drafts; a turn of the loop is four of them on a TPU.

    Its compiler may read the state's weights from memory in every turn, whatever a turn holds: on v5e it does.
    """
    scan = partial(jax.lax.scan, step)
    return jax.lax.platform_dependent(start, slots, tpu=partial(scan, unroll=4), default=scan)[1]


def _swap_rows_and_slots(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def _gates_of_candidates(candidates: Array | None, read_tokens: Callable[[Array], Array]) -> Array | None:
    """Return the GRU's input gates of every candidate; None where one token a step is quicker on any device."""
    if candidates is None or candidates.shape[0] * candidates.shape[-1] > _MAX_GATE_ROWS:
        return None
    gates = jax.eval_shape(read_tokens, candidates)
    return jax.lax.platform_dependent(
        candidates, cpu=lambda _: jnp.zeros(gates.shape, gates.dtype), default=read_tokens
    )


def _gates_of_choice(
    gates: Array | None, tokens: Int[Array, " B"], places: Int[Array, " B"], read_tokens: Callable[[Array], Array]
) -> Array:
    """Return the input gates of the chosen tokens, from those of all candidates where they were computed."""
    if gates is None:
        return read_tokens(tokens)
    return jax.lax.platform_dependent(
        tokens,
        places,
        gates,
        cpu=lambda tokens, *_: read_tokens(tokens),
        default=lambda _, places, gates: jnp.take_along_axis(gates, places[:, None, None], axis=1)[:, 0],
    )
