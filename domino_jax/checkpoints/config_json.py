"""`config.json` of targets and drafters <-> the frozen configs of this package.

In: the JSON object of a public checkpoint, in the classic form (`rope_theta`, `torch_dtype`) or the newer one
(`rope_parameters`, `dtype`). Out: `TargetConfig` / `DraftConfig`, or an error that names every setting this package
does not implement. Writing changes only the fields whose value differs, so unknown fields survive.

Source: Hugging Face `Qwen3Config`; the public `config.json` of Domino and DFlash drafters.
"""

import copy
import dataclasses
from typing import Any

from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import ConfigError, DraftConfig, TargetConfig, default_target_layer_ids, from_json_dict

TARGET_ARCHITECTURES = ("Qwen3ForCausalLM",)
DRAFT_ARCHITECTURES = ("DominoDraftModel", "DFlashDraftModel")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_HEAD_FIELDS = ("shift_label", "pure_draft_prefix_len", "gru_hidden_dim", "emb_dim")
_DFLASH_FIELDS = ("mask_token_id", "target_layer_ids", *_HEAD_FIELDS)


def parse_target_config(raw: dict[str, Any], where: str) -> TargetConfig:
    """Return the target that `raw` describes; `where` names the file in errors.

    Raises:
        CheckpointError: another architecture, a setting not implemented here, or a field that is missing or bad.
    """
    problems = _architecture_problems(raw, TARGET_ARCHITECTURES) + _setting_problems(raw)
    values = _shared_values(raw, problems)
    values["tie_word_embeddings"] = raw.get("tie_word_embeddings") or False
    _raise_problems(problems, where, "a dense Qwen3 target")
    return _build(TargetConfig, values, where)


def parse_draft_config(raw: dict[str, Any], where: str) -> DraftConfig:
    """Return the drafter that `raw` describes; `where` names the file in errors.

    Raises:
        CheckpointError: no drafter, a setting not implemented here, or a field that is missing or bad.
    """
    problems = _architecture_problems(raw, DRAFT_ARCHITECTURES) + _setting_problems(raw)
    values = _shared_values(raw, problems)
    nested = raw.get("dflash_config")
    if not isinstance(nested, dict):
        problems.append("dflash_config is missing (mask_token_id, target_layer_ids, ...)")
        nested = {}
    for name, source in (("block_size", raw), ("num_target_layers", raw), ("mask_token_id", nested)):
        values[name] = source.get(name)
        if values[name] is None:
            problems.append(f"{'dflash_config.' if source is nested else ''}{name} is missing")
    projector = nested.get("projector_type")
    if projector not in (None, "dflash", "domino"):
        problems.append(f"dflash_config.projector_type is {projector!r}; supported: 'domino', or none for plain DFlash")
    for name in _HEAD_FIELDS:
        if nested.get(name) is not None:
            values[name] = nested[name]
    if projector == "domino":
        for name in ("gru_hidden_dim", "emb_dim"):
            if not values.get(name):
                problems.append(f"dflash_config.{name} is missing, but projector_type is 'domino'")
    else:
        values.pop("gru_hidden_dim", None)
        values.pop("emb_dim", None)
    _raise_problems(problems, where, "a Domino or DFlash drafter of a Qwen3 target")
    layer_ids = nested.get("target_layer_ids")
    if layer_ids is None:
        layer_ids = default_target_layer_ids(int(values["num_target_layers"]), int(values["num_hidden_layers"]))
    values["target_layer_ids"] = layer_ids
    return _build(DraftConfig, values, where)


def write_target_config(config: TargetConfig, dtype: str, extra: dict[str, Any] | None) -> dict[str, Any]:
    """Return the `config.json` of a target in the classic form; sizes and settings in `extra` are overruled."""
    kept = {k: v for k, v in (extra or {}).items() if k not in ("rope_parameters", "dtype")}
    return (
        kept
        | _classic_fields(config, dtype)
        | {
            "architectures": list(TARGET_ARCHITECTURES),
            "tie_word_embeddings": config.tie_word_embeddings,
        }
    )


def write_draft_config(config: DraftConfig, dtype: str, raw: dict[str, Any] | None) -> dict[str, Any]:
    """Return the public `config.json` of a drafter: `raw` with what differs changed, or a whole new one without `raw`.

    Raises:
        CheckpointError: `raw` itself describes no drafter.
    """
    if raw is None:
        return _new_draft_config(config, dtype)
    updated = copy.deepcopy(raw)
    old = parse_draft_config(raw, "raw_config")
    if old.has_head != config.has_head:
        raise CheckpointError(
            f"raw_config describes a drafter {'with' if old.has_head else 'without'} a head, the parameters are one "
            f"{'with' if config.has_head else 'without'}; save without raw_config"
        )
    nested = updated["dflash_config"]
    for field in dataclasses.fields(DraftConfig):
        value = getattr(config, field.name)
        if value == getattr(old, field.name):
            continue
        value = list(value) if isinstance(value, tuple) else value
        if field.name == "rope_theta":
            _set_rope_theta(updated, value)
        elif field.name in _DFLASH_FIELDS:
            nested[field.name] = value
            if field.name in updated:
                updated[field.name] = value
        else:
            updated[field.name] = value
    if old.num_hidden_layers != config.num_hidden_layers and "layer_types" in updated:
        updated["layer_types"] = ["full_attention"] * config.num_hidden_layers
    names = [n for n in ("dtype", "torch_dtype") if n in updated] or ["dtype"]
    return updated | dict.fromkeys(names, dtype)


def _new_draft_config(config: DraftConfig, dtype: str) -> dict[str, Any]:
    architecture = "DominoDraftModel" if config.has_head else "DFlashDraftModel"
    module = "domino" if config.has_head else "dflash"
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.has_head:
        nested["projector_type"] = "domino"
    defaults = {f.name: f.default for f in dataclasses.fields(DraftConfig)}
    for name in _HEAD_FIELDS:
        if config.has_head or getattr(config, name) != defaults[name]:
            nested[name] = getattr(config, name)
    fields = _classic_fields(config, dtype)
    fields["dtype"] = fields.pop("torch_dtype")
    return (
        fields
        | ({"emb_dim": config.emb_dim} if config.has_head else {})
        | {
            "architectures": [architecture],
            "auto_map": {"AutoModel": f"{module}.{architecture}"},
            "block_size": config.block_size,
            "dflash_config": nested,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
            "num_target_layers": config.num_target_layers,
            "tie_word_embeddings": False,
        }
    )


def _classic_fields(config: TargetConfig | DraftConfig, dtype: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SIZES} | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
    }


def _set_rope_theta(raw: dict[str, Any], value: float) -> None:
    holders = [raw[n] for n in ("rope_parameters", "rope_scaling") if isinstance(raw.get(n), dict)]
    holders = [h for h in [*holders, raw] if "rope_theta" in h]
    for holder in holders or [raw]:
        holder["rope_theta"] = value


def _architecture_problems(raw: dict[str, Any], allowed: tuple[str, ...]) -> list[str]:
    found = raw.get("architectures") or []
    problems = []
    if not isinstance(found, list) or (found and not set(map(str, found)) <= set(allowed)):
        problems.append(f"architectures is {found!r}; supported: {', '.join(allowed)}")
    if raw.get("model_type") != "qwen3":
        problems.append(f"model_type is {raw.get('model_type')!r}; supported: 'qwen3'")
    return problems


def _setting_problems(raw: dict[str, Any]) -> list[str]:
    problems = []
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {raw['hidden_act']!r}; supported: 'silu'")
    if raw.get("attention_bias"):
        problems.append("attention_bias is true; supported: false")
    if raw.get("use_sliding_window"):
        problems.append("use_sliding_window is true; supported: false (full attention in every layer)")
    other_layers = sorted({str(t) for t in raw.get("layer_types") or []} - {"full_attention"})
    if other_layers:
        problems.append(f"layer_types holds {', '.join(other_layers)}; supported: full_attention")
    if raw.get("quantization_config"):
        problems.append("quantization_config is set; supported: float32, bfloat16 and float16 weights")
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            problems.append(f"{name} is {rope!r}; supported: null or an object of type 'default'")
            continue
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
        if rope_type != "default":
            problems.append(f"{name}.rope_type is {rope_type!r}; supported: 'default'")
        elif unknown and not (unknown == ["partial_rotary_factor"] and rope["partial_rotary_factor"] == 1):
            problems.append(f"{name} holds {', '.join(unknown)}; supported: rope_type 'default' with rope_theta only")
    return problems


def _shared_values(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    values = {name: raw.get(name) for name in _SIZES}
    ropes = [raw[n] for n in ("rope_parameters", "rope_scaling") if isinstance(raw.get(n), dict)]
    thetas = [r["rope_theta"] for r in [*ropes, raw] if r.get("rope_theta") is not None]
    values["rope_theta"] = thetas[0] if thetas else None
    problems.extend(f"{name} is missing" for name, value in values.items() if value is None)
    if raw.get("rms_norm_eps") is not None:
        values["rms_norm_eps"] = raw["rms_norm_eps"]
    return values


def _raise_problems(problems: list[str], where: str, what: str) -> None:
    if problems:
        raise CheckpointError(f"{where} does not describe {what} that can be used here:\n  " + "\n  ".join(problems))


def _build(config_type: type[Any], values: dict[str, Any], where: str) -> Any:
    try:
        return from_json_dict(config_type, values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
