"""A target and a drafter whose every axis divides over eight devices, and the meshes that tests run them on."""

import functools

import jax
import numpy as np

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.decoding.generate import Decoder
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import MeshConfig
from domino_jax.sharding import build_layout
from tests.decoding.tiny_pair import draw_params

VOCAB, CONTEXT, BLOCK, MASK_ID = 64, 128, 5, 62

QUICK = [(2, 1, False), (1, 8, False), (4, 2, False), (2, 2, True)]
OTHERS = [(1, 1, False), (1, 2, False), (4, 1, False), (1, 4, False), (8, 1, False), (2, 4, False), (2, 4, True)]
"""`data`, `model`, `fsdp`."""


def make_layout(data, model, fsdp=False):
    return build_layout(MeshConfig(data, model, fsdp), jax.devices()[: data * model])


@functools.cache
def make_pair(**draft_changes):
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4, "intermediate_size": 64}
    shared = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": CONTEXT, "rope_theta": 1e4} | sizes
    target = TargetConfig(num_hidden_layers=2, **shared)
    head = {"shift_label": True, "pure_draft_prefix_len": 1, "gru_hidden_dim": 24, "emb_dim": 16}
    draft = DraftConfig(
        num_hidden_layers=1,
        num_target_layers=2,
        target_layer_ids=(0, 1),
        block_size=BLOCK,
        mask_token_id=MASK_ID,
        **(shared | head | draft_changes),
    )
    # Layers that say little beside the token itself: both models then often agree, and blocks are accepted in part.
    quiet = {"o_proj": 0.5, "down_proj": 0.5, "up": 0.3}
    params = [
        jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * quiet.get(path[-1].key, 1.0), tree)
        for tree in (draw_params(init_target_params, target, 0), draw_params(init_draft_params, draft, 1))
    ]
    return target, params[0], draft, params[1]


def make_decoder(layout=None, **draft_changes):
    target, target_params, draft, draft_params = make_pair(**draft_changes)
    return Decoder(target, target_params, draft, draft_params, layout=layout)


def make_batch(seed, sequences, length=32):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length // 2, length + 1, sequences).astype(np.int32)
    positions = np.arange(length)
    is_token = positions < lengths[:, None]
    ids = np.where(is_token, generator.integers(0, MASK_ID, (sequences, length)), 0).astype(np.int32)
    return ids, (is_token & (positions >= 6)).astype(np.float32), lengths
