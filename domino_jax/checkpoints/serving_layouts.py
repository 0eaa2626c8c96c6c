"""The forms in which other programs load a drafter: what each reads of `config.json`, and what it cannot express.

In: a drafter's sizes and its public `config.json`. Out: the `config.json` that the named program loads, or an error
that says why it would not serve this drafter; and the public form of one that this module wrote. The tensors' names
and shapes are the same in all of them.

Source: loaders of sgl-project/sglang, vllm-project/vllm, vllm-project/speculators and sgl-project/SpecForge; files and
commits stand in `tests/checkpoints/contracts/`.
"""

from itertools import pairwise
from typing import Any

from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import DraftConfig

LAYOUTS = ("public", "sglang", "specforge", "vllm", "speculators")
"""`public` is what this project reads and writes; the others are named after the program that loads them."""

TYPE_KEY = "speculators_model_type"
"""Field that marks a `config.json` of the speculators library."""

_PLAIN = "DFlashDraftModel"
_DOMINO = "DominoDraftModel"
_OUTSIDE_LAYERS = ("architectures", "auto_map", "block_size", "dflash_config")
"""Fields of the public form that have a place of their own in the speculators form."""


def arrange_config(
    layout: str, config: DraftConfig, dtype: str, public: dict[str, Any], verifier: str = ""
) -> dict[str, Any]:
    """Return the `config.json` that the program `layout` is named after loads.

    Args:
        dtype: type that the weights are written in.
        public: the drafter's public `config.json`.
        verifier: the target's hub id or directory; the speculators form names it, the others do not.

    Raises:
        CheckpointError: that program cannot load or would misread this drafter; every reason is named.
    """
    problems = _find_problems(layout, config, dtype, verifier)
    if problems:
        raise CheckpointError(f"layout {layout!r} cannot hold this drafter:\n  " + "\n  ".join(problems))
    if layout == "public":
        return public
    if layout == "speculators":
        return _speculators_config(config, public, verifier)
    architecture = _DOMINO if layout == "specforge" and config.has_head else _PLAIN
    module = "domino" if architecture == _DOMINO else "dflash"
    return public | {"architectures": [architecture], "auto_map": {"AutoModel": f"{module}.{architecture}"}}


def restore_public(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the public form of a `config.json` in the speculators form; `where` names the file in errors.

    Raises:
        CheckpointError: another kind of drafter, a vocabulary of its own, or a field that is missing.
    """
    if raw[TYPE_KEY] != "dflash":
        raise CheckpointError(f"{where}: {TYPE_KEY} is {raw[TYPE_KEY]!r}; supported: 'dflash'")
    layers, layer_ids = raw.get("transformer_layer_config"), raw.get("aux_hidden_state_layer_ids")
    if not isinstance(layers, dict) or not isinstance(layer_ids, list) or not all(type(i) is int for i in layer_ids):
        raise CheckpointError(
            f"{where}: transformer_layer_config or aux_hidden_state_layer_ids is missing; give a drafter that "
            "speculators or scripts/convert_checkpoint.py --layout speculators wrote"
        )
    if raw.get("draft_vocab_size") != layers.get("vocab_size"):
        raise CheckpointError(
            f"{where}: draft_vocab_size is {raw.get('draft_vocab_size')}, vocab_size {layers.get('vocab_size')}; "
            "supported: drafters of the target's whole vocabulary"
        )
    if raw.get("sample_from_anchor"):
        raise CheckpointError(f"{where}: sample_from_anchor is true; supported: false")
    return layers | {
        "architectures": [_PLAIN],
        "auto_map": {"AutoModel": f"dflash.{_PLAIN}"},
        "block_size": raw.get("block_size"),
        "dflash_config": {
            "mask_token_id": raw.get("mask_token_id"),
            "target_layer_ids": [layer_id - 1 for layer_id in layer_ids],
        },
    }


def _find_problems(layout: str, config: DraftConfig, dtype: str, verifier: str) -> list[str]:
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    problems = []
    if bool(verifier) != (layout == "speculators"):
        problems.append(
            f"the target is {verifier!r}, but only 'speculators' names one: leave --verifier out"
            if verifier
            else "the target's hub id or directory is missing, which its config.json names: give --verifier"
        )
    if layout in ("public", "specforge"):
        return problems
    ids = config.target_layer_ids
    if any(a >= b for a, b in pairwise(ids)):
        problems.append(f"target_layer_ids are {list(ids)}; features are collected in ascending order there, once each")
    if not config.has_head and config.shift_label:
        problems.append(
            "shift_label is true without a head; plain DFlash is read there with slot k as the k-th token after the "
            "anchor: train it with draft.shift_label=False"
        )
    if layout == "sglang":
        return problems + _sglang_problems(config, dtype)
    if config.has_head:
        problems.append(
            f"it has a Domino head (gru_hidden_dim {config.gru_hidden_dim}), which vLLM does not run and without which "
            "the backbone drafts worse: serve it with SGLang (layout 'sglang'), or train a plain DFlash drafter "
            "(draft.gru_hidden_dim=0, draft.emb_dim=0)"
        )
    if ids[-1] == config.num_target_layers - 1:
        problems.append(
            f"target_layer_ids end with {ids[-1]}, the target's last layer, whose output vLLM does not hand to drafters"
        )
    return problems


def _sglang_problems(config: DraftConfig, dtype: str) -> list[str]:
    problems = []
    if config.has_head and config.pure_draft_prefix_len != 1:
        problems.append(
            f"pure_draft_prefix_len is {config.pure_draft_prefix_len}; SGLang leaves exactly the first drafted token "
            "uncorrected, so 1 is what it serves"
        )
    if config.has_head and dtype != "bfloat16":
        problems.append(f"the weights are {dtype}; SGLang takes a Domino head in bfloat16 only: give --dtype bfloat16")
    return problems


def _speculators_config(config: DraftConfig, public: dict[str, Any], verifier: str) -> dict[str, Any]:
    # num_target_layers has no place of its own; extra fields of the layers' config are kept by transformers, and
    # reading the drafter back needs it.
    layers = {name: value for name, value in public.items() if name not in _OUTSIDE_LAYERS}
    return {
        "architectures": [_PLAIN],
        TYPE_KEY: "dflash",
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": verifier},
        },
        "transformer_layer_config": layers,
    }
