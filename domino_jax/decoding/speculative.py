"""One speculative round - draft, verify, accept, commit - as a pure function, and the loop over it.

Rows of a batch advance independently; shapes never change. The tokens that come out follow the target alone,
whatever the drafter proposes.

Source: Domino, arXiv 2605.29707 (draft and head rollout); arXiv 2211.17192 (rejection rule).
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from domino_jax.decoding.cache_growth import can_go_on
from domino_jax.decoding.plain import choose_next
from domino_jax.decoding.rollout import Proposal, choose_block
from domino_jax.decoding.state import (
    SOURCE_BONUS,
    SOURCE_CORRECTED,
    SOURCE_DRAFTED,
    DecodeSettings,
    DecodeState,
    ModelParams,
    commit_tokens,
)
from domino_jax.models.draft_backbone import DraftBackbone
from domino_jax.models.qwen3 import Qwen3, TargetOutput, embed_tokens, project_to_vocabulary
from domino_jax.ops.kv_cache import KVCache
from domino_jax.ops.precision import in_full_precision
from domino_jax.ops.sampling import (
    gumbel_noise,
    row_probabilities,
    scale_and_filter,
    uniform_noise,
)
from domino_jax.ops.verification import accept_by_ratio, accept_equal, sample_law
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain_tree

Propose: TypeAlias = Callable[[DecodeSettings, ModelParams, DecodeState], Proposal]


def draft_states(
    settings: DecodeSettings, params: ModelParams, state: DecodeState
) -> tuple[Float[Array, "B P D"], Int[Array, " B"]]:
    """Return the backbone's states of the slots that draft tokens, and the anchors they start from."""
    draft = settings.draft
    anchors = jnp.take_along_axis(state.tokens, state.anchor_pos[:, None], axis=1)[:, 0]
    block = jnp.full((anchors.shape[0], settings.block_size), draft.mask_token_id).at[:, 0].set(anchors)
    hidden = DraftBackbone(draft, dtype=jnp.dtype(settings.dtype)).apply(
        {"params": params.draft["backbone"]},
        embed_tokens(params.target["embed_tokens"], block, jnp.dtype(settings.dtype)),
        state.anchor_pos,
        state.draft_cache,
        method=DraftBackbone.draft,
    )
    return hidden[:, -settings.num_draft_tokens :], anchors


def backbone_block(
    settings: DecodeSettings, params: ModelParams, state: DecodeState
) -> tuple[Float[Array, "B P D"], Float[Array, "B P U"], Int[Array, " B"]]:
    """Return the states and base logits of the slots that draft tokens, and the anchors they start from."""
    hidden, anchors = draft_states(settings, params, state)
    return hidden, project_to_choices(params, hidden), anchors


def project_to_choices(params: ModelParams, hidden: Float[Array, "B P D"]) -> Float[Array, "B P U"]:
    """Return the base logits of the tokens that may be drafted."""
    return project_to_vocabulary(hidden, params.draft_lm_head)


def propose_block(settings: DecodeSettings, params: ModelParams, state: DecodeState) -> Proposal:
    """Draft a block: the backbone in one pass, then the head token by token where there is one."""
    return choose_block(settings, params, state, *backbone_block(settings, params, state))


def read_block(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, drafts: Int[Array, "B P"]
) -> tuple[Float[Array, "B W V"], TargetOutput]:
    """Run the target once over anchor and drafts; return its logits and everything else it returns."""
    target = Qwen3(settings.target, settings.draft.target_layer_ids, jnp.dtype(settings.dtype))
    variables = {"params": params.target}
    anchors = jnp.take_along_axis(state.tokens, state.anchor_pos[:, None], axis=1)
    output = target.apply(
        variables,
        jnp.concatenate([anchors, drafts], axis=1),
        state.anchor_pos,
        state.target_cache,
        method=Qwen3.forward_cached,
    )
    return target.apply(variables, output.hidden, method=Qwen3.logits), output


def verify_block(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, drafts: Int[Array, "B P"]
) -> tuple[Float[Array, "B W V"], Float[Array, "B W D"], DecodeState]:
    """Return the target's logits and last states over anchor and drafts, and `state` with both caches written."""
    logits, output = read_block(settings, params, state, drafts)
    draft_cache = write_features(settings, params, output.features, state.anchor_pos, state.draft_cache)
    return logits, output.hidden, state.replace(target_cache=output.cache, draft_cache=draft_cache)


def write_features(
    settings: DecodeSettings, params: ModelParams, features: Array, start: Array, draft_cache: KVCache
) -> KVCache:
    """Project target features and write them into the draft's context cache at positions `start ..`."""
    backbone = DraftBackbone(settings.draft, dtype=jnp.dtype(settings.dtype))
    variables = {"params": params.draft["backbone"]}
    context = backbone.apply(variables, features, method=DraftBackbone.project_context)
    return backbone.apply(variables, context, start, draft_cache, method=DraftBackbone.write_context)


def accept_block(
    settings: DecodeSettings, state: DecodeState, proposal: Proposal, logits: Float[Array, "B W V"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Return how many drafts each row accepts and the target's token that follows them."""
    positions = state.committed_len[:, None] + jnp.arange(logits.shape[1])
    if proposal.noise is not None and proposal.noise.shape != logits.shape:
        raise ValueError(
            f"the noise of a proposal has shape {proposal.noise.shape}, the logits {logits.shape}; leave it out (None)"
        )
    if settings.rule != "rejection":
        return accept_equal(proposal.tokens, choose_next(logits, positions, state, settings, proposal.noise))
    target_probs = row_probabilities(scale_and_filter(logits, state.sampling, settings.has_filters), state.sampling)
    uniform = uniform_noise(state.sampling.seed, positions[:, :-1], "accept")
    num_accepted, law = accept_by_ratio(proposal.tokens, proposal.probs, target_probs, uniform)
    after = (state.committed_len + num_accepted)[:, None]
    noise = gumbel_noise(state.sampling.seed, after, logits.shape[-1], "residual")[:, 0]
    return num_accepted, sample_law(law, noise)


def run_round(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, propose: Propose = propose_block
) -> DecodeState:
    """Advance every row that is not done by one round: 1 to K + 1 tokens.

    `propose` drafts; whatever tokens it returns, the committed text follows the target.
    """
    proposal = propose(settings, params, state)
    logits, _, state = verify_block(settings, params, state, proposal.tokens)
    return commit_block(settings, state, proposal, logits)


def commit_block(
    settings: DecodeSettings, state: DecodeState, proposal: Proposal, logits: Float[Array, "B W V"]
) -> DecodeState:
    """Append what the target accepts of a proposal, and its own token after it, to every row that is not done."""
    num_accepted, next_token = accept_block(settings, state, proposal, logits)
    return commit_accepted(state, proposal.tokens, num_accepted, next_token)


def commit_accepted(
    state: DecodeState, drafts: Int[Array, "B P"], num_accepted: Int[Array, " B"], next_token: Int[Array, " B"]
) -> DecodeState:
    """Append the accepted drafts and the target's token after them to every row that is not done."""
    num_drafts = drafts.shape[1]
    index = jnp.arange(num_drafts + 1)
    is_draft = index < num_accepted[:, None]
    new_tokens = jnp.where(is_draft, jnp.pad(drafts, ((0, 0), (0, 1))), next_token[:, None])
    own_source = jnp.where(num_accepted == num_drafts, SOURCE_BONUS, SOURCE_CORRECTED)[:, None]
    sources = jnp.where(is_draft, SOURCE_DRAFTED, own_source)
    is_active = ~state.is_done
    state, acceptance_len = commit_tokens(state, new_tokens, num_accepted + 1, sources)
    recorded = jax.vmap(lambda row, at, length: row.at[at].add(length, mode="drop"))(
        state.acceptance_lengths, state.num_rounds, acceptance_len
    )
    return constrain_tree(state.replace(acceptance_lengths=recorded, num_rounds=state.num_rounds + is_active))


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
@in_full_precision
def decode_speculative(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, propose: Propose = propose_block
) -> DecodeState:
    """Run rounds until every row is done, or one needs longer caches for a round; `state` is donated."""
    goes_on = partial(can_go_on, num_new=settings.num_draft_tokens + 1)
    return jax.lax.while_loop(goes_on, lambda s: run_round(settings, params, s, propose), state)
