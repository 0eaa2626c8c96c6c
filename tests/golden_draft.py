"""Golden cases of a drafter: its rounds seen from inside, and its training losses and gradients."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from domino_jax.checkpoints.huggingface import save_draft
from domino_jax.models.domino_head import DominoHead
from domino_jax.models.draft_backbone import DraftBackbone, init_draft_cache
from domino_jax.models.qwen3 import Qwen3, head_weight, init_target_cache, project_to_vocabulary
from domino_jax.ops.attention import attend_blocks
from domino_jax.run_config import ObjectiveConfig
from domino_jax.training.anchors import build_blocks, find_candidates
from domino_jax.training.loss import LossSums, block_losses, compute_metrics, draft_logits
from tests.golden_files import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    RULE_TOLERANCE,
    Recorded,
    Result,
    find_target,
    open_draft,
    open_target,
    read_json,
)

GAMMA = 7.0  # of the recorded runs named gamma_7
FLOAT32 = jnp.dtype("float32")
# Names of the recorded numbers, and ours: metrics, and the sums they are made of.
METRIC_NAMES = {
    "loss": "loss",
    "final_loss": "corrected_loss",
    "base_loss": "base_loss",
    "accuracy": "accuracy",
    "base_accuracy": "base_accuracy",
    "accept_len": "accept_len",
    "base_accept_len": "base_accept_len",
}
SUM_NAMES = {
    "loss_num": "loss_num",
    "final_num": "loss_num",
    "base_num": "base_loss_num",
    "loss_den": "loss_den",
    "correct_num": "correct_num",
    "base_correct_num": "base_correct_num",
    "accuracy_den": "correct_den",
    "accept_num": "accept_num",
    "base_accept_num": "base_accept_num",
    "accept_den": "accept_den",
}


def check_backbone(root: Path, name: str) -> Result:
    draft = open_draft(root / "draft" / name)
    target_config, target_params = open_target(find_target(root, name))
    recorded = Recorded(load_file(root / "backbone" / f"{name}.safetensors"))
    num_rounds = len({key.split(".")[0] for key in recorded if key.startswith("round")})
    rounds = [recorded.part(f"round{r}.") for r in range(num_rounds)]
    longest = max(data["target_hidden"].shape[1] for data in rounds)
    num_positions = rounds[-1]["cache_k_after_forward"].shape[3] + longest + 2
    verify = _jit_verify(target_config, target_params, draft.config.target_layer_ids)
    run_draft = _jit_draft(draft, target_params)
    target_cache = init_target_cache(target_config, 1, num_positions, FLOAT32)
    cache = init_draft_cache(draft.config, 1, num_positions, FLOAT32)
    result = Result()
    # The prompt in pieces as wide as a verify pass; what a piece writes past it is overwritten before it is seen.
    features, start, width = [], 0, rounds[0]["verify_ids"].shape[1]
    prompt = recorded["prompt_ids"]
    for i in range(0, prompt.shape[1], width):
        piece = prompt[:, i : i + width]
        padded = np.pad(piece, ((0, 0), (0, width - piece.shape[1]))).astype(np.int32)
        piece_features, _, target_cache = verify(padded, np.full(1, i, np.int32), target_cache)
        features.append(piece_features)
    features = jnp.concatenate(features, axis=1)
    for r, data in enumerate(rounds):
        num_new, block_size = data["target_hidden"].shape[1], data["block_ids"].shape[1]
        result.compare(f"round{r}.target_hidden", features[:, :num_new], data["target_hidden"])
        new_features = np.pad(data["target_hidden"], ((0, 0), (0, longest - num_new), (0, 0)))
        positions = np.arange(start, start + num_new + block_size)[None]
        result.equal(f"round{r}.position_ids", positions, data["position_ids"])
        anchor_pos = np.full(1, start + num_new, np.int32)
        block_ids = data["block_ids"].astype(np.int32)
        cache, ours = run_draft(new_features, np.full(1, start, np.int32), block_ids, anchor_pos, cache)
        start += num_new
        keys = jnp.stack([k[..., :start].swapaxes(-1, -2) for k in cache.keys])
        values = jnp.stack([v[..., :start, :] for v in cache.values])
        result.compare(f"round{r}.cache_k", keys, data["cache_k_after_forward"][..., :start, :])
        result.compare(f"round{r}.cache_v", values, data["cache_v_after_forward"][..., :start, :])
        result.equal(f"round{r}.draft_tokens", ours.pop("draft_tokens"), data["draft_tokens"])
        for key in ours.keys() & data.keys():
            result.compare(f"round{r}.{key}", ours[key], data[key])
        features, logits, target_cache = verify(data["verify_ids"].astype(np.int32), anchor_pos, target_cache)
        logits = logits[:, : data["target_posterior"].shape[1]]
        result.compare(f"round{r}.target_verify_logits", logits, data["target_verify_logits"])
        result.equal(f"round{r}.target_posterior", logits.argmax(-1), data["target_posterior"])
        result.all_read(data, f"round{r}.")
    result.all_read(recorded)
    return result


def _jit_verify(config: object, params: dict, layer_ids: tuple[int, ...]) -> Callable:
    model = Qwen3(config, layer_ids)

    @jax.jit
    def verify(params: dict, ids: jax.Array, start: jax.Array, cache: object) -> tuple:
        output = model.apply({"params": params}, ids, start, cache, method=Qwen3.forward_cached)
        return output.features, model.apply({"params": params}, output.hidden, method=Qwen3.logits), output.cache

    return partial(verify, params)


def _jit_draft(draft: object, target_params: dict) -> Callable:
    """Return one round of a drafter, written apart from `decoding`: named as in the recorded files."""
    config = draft.config

    # Weights are arguments: as constants of the program they would be folded while it is compiled.
    @jax.jit
    def run(weights: tuple, features: jax.Array, start: jax.Array, block_ids: jax.Array, anchor_pos: jax.Array, cache):
        params, embedding, output_head = weights
        backbone = partial(DraftBackbone(config).apply, {"params": params["backbone"]})
        cache = backbone(backbone(features, method="project_context"), start, cache, method="write_context")
        block = embedding[block_ids]
        hidden = backbone(block, anchor_pos, cache, method="draft")
        rows = hidden if config.shift_label else hidden[:, 1:]
        base = project_to_vocabulary(rows, output_head)
        ours = {"noise_embedding": block, "draft_hidden": hidden, "rollout_hidden": rows, "base_logits": base}
        if not config.has_head:
            return cache, ours | {"draft_tokens": base.argmax(-1)}
        head = partial(DominoHead(config).apply, {"params": params["head"]})
        first = min(config.pure_draft_prefix_len, rows.shape[1])

        def step(carry: tuple, slot: tuple) -> tuple:
            state, token = carry
            index, base_row, row = slot
            state = head(state, embedding[token], method="step")
            logits = base_row + jnp.where(index >= first, head(row, state, method="correct"), 0.0)
            token = logits.argmax(-1).astype(jnp.int32)
            return (state, token), (token, logits, state)

        begin = (head((1,), method="init_state"), block_ids[:, 0])
        slots = (jnp.arange(rows.shape[1]), base.swapaxes(0, 1), rows.swapaxes(0, 1))
        tokens, logits, states = (x.swapaxes(0, 1) for x in jax.lax.scan(step, begin, slots)[1])
        ours |= {"draft_tokens": tokens, "prefix_logits": base[:, :first]}
        return cache, ours | {"corrected_logits": logits[:, first:], "gru_states": states[:, first:]}

    return partial(run, (draft.params, target_params["embed_tokens"], head_weight(target_params)))


def check_training(root: Path, name: str) -> Result:
    draft = open_draft(root / "draft" / name)
    _, target_params = open_target(find_target(root, name))
    recorded = load_file(root / "train" / f"{name}.safetensors")
    runs = read_json(root / "train" / f"{name}.json")
    data = Recorded({k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in recorded.items()})
    anchor_pos, keep = data["anchor_positions"], data["block_keep_mask"]
    length, block = data["input_ids"].shape[1], draft.config.block_size
    lengths = np.full(len(anchor_pos), length, np.int32)
    result = Result()
    arrays = (data["input_ids"], data["loss_mask"], lengths, anchor_pos, keep)
    common = (draft.config, *map(jnp.asarray, arrays))
    blocks, flat = build_blocks(*common, GAMMA), build_blocks(*common, 0.0)
    has_label = keep[..., None] & (anchor_pos[..., None] + np.arange(block) + draft.config.shift_label < length)
    result.equal("labels", np.where(has_label, blocks.labels, 0), np.where(has_label, data["labels"], 0))
    result.equal("noise_ids", blocks.token_ids.reshape(len(anchor_pos), -1), data["noise_ids"])
    result.compare("weight_mask_gamma7", blocks.weights, data["weight_mask_gamma7"], RULE_TOLERANCE)
    result.equal("weight_mask_binary", blocks.is_scored, data["weight_mask_binary"])
    result.equal("weights without decay", flat.weights, data["weight_mask_binary"])
    if "head_token_ids" in data:
        num_read = data["head_token_ids"].shape[-1]
        inside = keep[..., None] & (anchor_pos[..., None] + np.arange(num_read) < length)
        teacher_ids = np.where(inside, blocks.teacher_ids[..., :num_read], 0)
        result.equal("head_token_ids", teacher_ids, np.where(inside, data["head_token_ids"], 0))
    offsets = (anchor_pos[..., None] + np.arange(block)).reshape(len(anchor_pos), -1)
    context = np.broadcast_to(np.arange(length), (len(anchor_pos), length))
    result.equal("position_ids", np.concatenate([context, offsets], axis=1), data["position_ids"])
    is_candidate = np.take_along_axis(np.asarray(find_candidates(jnp.asarray(data["loss_mask"]))), anchor_pos, axis=1)
    result.equal("anchors that are no candidates", np.sum(~is_candidate & keep), 0)
    if "attention_mask" in data:
        attend_mask = data["attention_mask"].reshape(*anchor_pos.shape, block, -1)
        result.equal("attention_mask", find_attended(anchor_pos, length, block)[keep], attend_mask[keep])
    _compare_losses(result, draft, target_params, data, lengths, runs)
    result.all_read(data)
    return result


def find_attended(anchor_pos: np.ndarray, length: int, block: int) -> np.ndarray:
    """Return which context positions and slots of all blocks every slot attends to, found out by attending.

    All scores are equal and every position has a value of its own: what arrives has been seen.
    """
    batch, num_anchors = anchor_pos.shape
    num_seen = length + num_anchors * block
    values = jnp.broadcast_to(jnp.eye(num_seen), (batch, num_seen, num_seen))
    slots = values[:, length:].reshape(batch, num_anchors, block, 1, num_seen)
    zeros = jnp.zeros((batch, 1, num_seen, length))
    seen = jax.jit(attend_blocks)(0 * slots, zeros, values[:, None, :length], 0 * slots, slots, jnp.asarray(anchor_pos))
    return np.asarray(seen[:, :, :, 0] > 0)


def _jit_losses(config: object, gamma: float, weight: float) -> Callable:
    """Return one program for everything that is recorded of a drafter's losses; all data are its arguments."""

    def sum_losses(params: dict, decay: float, embedding: jax.Array, head: jax.Array, features: jax.Array, inputs):
        objective = ObjectiveConfig(loss_decay_gamma=decay, head_chunk=4)
        return block_losses(config, objective, params, embedding, head, features, *inputs, FLOAT32)

    def loss(params: dict, *rest: object) -> tuple:
        sums = sum_losses(params, gamma, *rest)
        return compute_metrics(ObjectiveConfig(), sums, weight)["loss"], sums

    @jax.jit
    def run(params: dict, embedding: jax.Array, head: jax.Array, features: jax.Array, inputs: tuple) -> tuple:
        blocks = build_blocks(config, *inputs, 0.0)
        backbone = partial(DraftBackbone(config).apply, {"params": params["backbone"]})
        context = backbone(features, method="project_context")
        hidden = backbone(context, embedding[blocks.token_ids], inputs[3], method="train")
        flat_hidden, flat_ids = (x.reshape(-1, *x.shape[2:]) for x in (hidden, blocks.teacher_ids))
        logits = draft_logits(config, params, embedding, head, flat_hidden, flat_ids)
        rest = embedding, head, features, inputs
        gradients, sums = jax.grad(loss, has_aux=True)(params, *rest)
        return hidden, logits, gradients, {gamma: sums, 0.0: sum_losses(params, 0.0, *rest)}

    return run


def _compare_losses(
    result: Result, draft: object, target_params: dict, data: dict, lengths: np.ndarray, recorded: dict
) -> None:
    keep, grad_run = data["block_keep_mask"], recorded["grad_run"]
    weight = recorded["runs"][grad_run].get("lambda_base", 0.0)
    inputs = data["input_ids"], data["loss_mask"], lengths, data["anchor_positions"], keep
    run = _jit_losses(draft.config, GAMMA, weight)
    hidden, (corrected, base), gradients, sums_by_gamma = run(
        draft.params, target_params["embed_tokens"], head_weight(target_params), data["hidden_states"], inputs
    )
    result.compare("draft_hidden", hidden[keep], data["draft_hidden"][keep])
    for name, ours in (("base_logits", base), ("final_logits", corrected)):
        if name in data:
            ours = ours.reshape(*keep.shape, *ours.shape[1:])
            result.compare(name, ours[keep], data[name][keep][:, -ours.shape[2] :])
    for name, numbers in recorded["runs"].items():
        sums = sums_by_gamma[GAMMA if name.startswith("gamma_7") else 0.0]
        compare_numbers(result, name, sums, Recorded(numbers))
    with TemporaryDirectory() as directory:  # exported, the gradients carry the public names and layout
        save_draft(directory, draft.config, gradients, dtype="float32")
        exported = load_file(Path(directory) / "model.safetensors")
    result.equal("trained tensors", sorted(exported), sorted(k[5:] for k in data if k.startswith("grad.")))
    for key in exported.keys() & {k[5:] for k in data if k.startswith("grad.")}:
        ours, theirs = exported[key], data[f"grad.{key}"]
        if ours.shape != theirs.shape:
            result.fail(f"gradient of {key} has shape {ours.shape}, recorded {theirs.shape}")
            continue
        error = float(np.max(np.abs(ours - theirs)) / max(float(np.max(np.abs(theirs))), 1e-30))
        result.bound(f"gradient of {key}", error, GRADIENT_TOLERANCE)


def compare_numbers(result: Result, name: str, sums: LossSums, recorded: Recorded) -> None:
    for optional, default in (("lambda_base", 0.0), ("terms", {})):
        recorded.setdefault(optional, default)
    metrics = compute_metrics(ObjectiveConfig(), sums, recorded["lambda_base"])
    terms = Recorded(recorded["terms"])
    for theirs in METRIC_NAMES.keys() & recorded.keys():
        result.compare(f"{name} {theirs}", metrics[METRIC_NAMES[theirs]], recorded[theirs], LOSS_TOLERANCE)
    for theirs in SUM_NAMES.keys() & terms.keys():
        result.compare(f"{name} terms.{theirs}", getattr(sums, SUM_NAMES[theirs]), terms[theirs], LOSS_TOLERANCE)
    result.compare(f"{name} accuracy_denom", sums.correct_den, recorded["accuracy_denom"], LOSS_TOLERANCE)
    result.all_read(recorded, f"{name} ")
    result.all_read(terms, f"{name} terms.")
