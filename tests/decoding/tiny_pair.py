"""A target and drafter small enough to run thousands of rows, and a drafter whose luck the test decides.

Compiling costs more than running here: tests share this pair, batches of 8 and the cache bucket of 256 positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config import DraftConfig, SamplingConfig, TargetConfig
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.rollout import Proposal
from domino_jax.decoding.speculative import propose_block
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params

VOCAB, CONTEXT, BLOCK, MASK_ID = 48, 128, 5, 46
SHARP = SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02)


SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}


def make_configs(vocab=VOCAB, context=CONTEXT, block=BLOCK, mask_id=MASK_ID, sizes=None, **draft_changes):
    sizes = sizes or SIZES
    shared = {"vocab_size": vocab, "hidden_size": 32, "max_position_embeddings": context, "rope_theta": 1e4} | sizes
    target = TargetConfig(num_hidden_layers=2, **shared)
    head = {"shift_label": True, "pure_draft_prefix_len": 1, "gru_hidden_dim": 24, "emb_dim": 16}
    draft = DraftConfig(
        num_hidden_layers=1,
        num_target_layers=2,
        target_layer_ids=(0, 1),
        block_size=block,
        mask_token_id=mask_id,
        **(shared | head | draft_changes),
    )
    return target, draft


def draw_params(init, config, seed):
    """Draw parameters on the host with wide laws; the shapes are the package's own."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))

    def draw(leaf):
        is_matrix = len(leaf.shape) > 1
        values = generator.normal(size=leaf.shape) * 0.25 if is_matrix else generator.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, shapes)


@functools.cache
def make_decoder(seed=0, **changes):
    target, draft = make_configs(**changes)
    return Decoder(
        target, draw_params(init_target_params, target, seed), draft, draw_params(init_draft_params, draft, seed + 1)
    )


def propose_known(settings, params, state):
    """Draft the tokens that the test put under `known` by absolute position, or, where they are -1, as usual."""
    proposal = propose_block(settings, params, state)
    known = params.draft["known"]
    positions = state.committed_len[:, None] + jnp.arange(settings.num_draft_tokens)
    tokens = jnp.take_along_axis(known, jnp.minimum(positions, known.shape[1] - 1), axis=1)
    return Proposal(jnp.where(tokens >= 0, tokens, proposal.tokens), proposal.probs)


def with_known(decoder, sequences, shift=0, num_rows=8):
    """Return a decoder that drafts `sequences`: all right, all wrong with a `shift`, its own where None."""
    target, draft = decoder.settings.target, decoder.settings.draft
    known = np.full((num_rows, target.max_position_embeddings + BLOCK + 1), -1, np.int32)
    for row, ids in enumerate(sequences or ()):
        known[row] = shift
        known[row, : len(ids)] = (np.array(ids) + shift) % target.vocab_size
    return Decoder(target, decoder.params.target, draft, {**decoder.params.draft, "known": jnp.asarray(known)})


def make_prompts(lengths, vocab=VOCAB, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, n).tolist() for n in lengths]


def full_sequences(generations):
    return [g.prompt_ids + g.output_ids for g in generations]


def assert_same_text(got, wanted):
    assert [g.output_ids for g in got] == [w.output_ids for w in wanted]
    assert [g.finish_reason for g in got] == [w.finish_reason for w in wanted]
