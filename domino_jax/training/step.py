"""The jitted training and evaluation steps of a drafter, and the state they carry.

A step takes token ids, a loss mask and lengths, split into micro-steps, runs the frozen target on them to get its
features, draws anchors, sums losses and gradients over the micro-steps, divides once by the weight of the whole batch
and applies clipped AdamW. It knows nothing about files, tokenizers or progress. This is the only jit of the drafter's
training.

Source: Domino, arXiv 2605.29707; AdamW, arXiv 1711.05101.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import Qwen3, head_weight
from domino_jax.ops.precision import in_full_precision
from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.shapes import Array, Float, Int, Params
from domino_jax.training.anchors import choose_anchors
from domino_jax.training.loss import LossSums, add_sums, block_losses, compute_metrics, mix_losses, zero_sums
from domino_jax.training.schedule import base_weight_schedule, learning_rate_schedule


@flax.struct.dataclass
class TrainState:
    """Everything of a drafter's training that changes from step to step, and the key it draws from.

    Attributes:
        step: int32 scalar: optimizer steps done, batches without a single anchor included.
        params: the drafter's float32 master weights.
        opt_state: moments of AdamW.
        key_data: uint32 bits of the PRNG key; it stays as it is, every draw folds step and sequence number into it.
    """

    # Leaves are open: checkpointing puts host arrays, shapes and placements into the same tree.
    step: Any
    params: Params
    opt_state: optax.OptState
    key_data: Any


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return clipped AdamW without its learning rate, which the step multiplies in; norm weights never decay."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return optax.chain(
        clip, optax.scale_by_adam(config.b1, config.b2), decay if config.weight_decay > 0 else optax.identity()
    )


def create_train_state(
    draft_config: DraftConfig, optimizer: OptimizerConfig, key: Array, params: Params | None = None
) -> TrainState:
    """Return the state before the first step; `params` continues from a drafter instead of a fresh one.

    `key` is a typed key (`jax.random.key`). The state owns copies: `params` may be used afterwards.
    """
    init_key, anchor_key = jax.random.split(key)
    if params is None:
        params = jax.jit(init_draft_params, static_argnums=0)(draft_config, init_key)
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(build_optimizer(optimizer).init)(params),
        key_data=jax.random.key_data(anchor_key),
    )


def _draw_anchors(key: Array, first_sequence: Array, loss_mask: Array, num_anchors: int) -> tuple[Array, Array]:
    """Draw the anchors of some sequences of a batch; a sequence's key depends on its number in the batch alone."""
    numbers = first_sequence + jnp.arange(loss_mask.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return jax.vmap(choose_anchors, (0, 0, None))(keys, loss_mask, num_anchors)


def _make_micro_loss(
    target_config: TargetConfig,
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    compute_dtype: str,
    target_dtype: str,
) -> Callable[..., LossSums]:
    """Return the sums of one micro-step as a function of the drafter's parameters and the batch."""
    target = Qwen3(target_config, draft_config.target_layer_ids, jnp.dtype(target_dtype))

    def micro_loss(
        params: Params,
        target_params: Params,
        key: Array,
        first_sequence: Array,
        input_ids: Int[Array, "B S"],
        loss_mask: Float[Array, "B S"],
        lengths: Int[Array, " B"],
    ) -> LossSums:
        is_token = jnp.arange(input_ids.shape[1]) < lengths[:, None]
        loss_mask = jnp.where(is_token, loss_mask, 0.0)
        anchor_pos, keep_mask = _draw_anchors(key, first_sequence, loss_mask, objective.num_anchors)
        features = jax.lax.stop_gradient(target.apply({"params": target_params}, input_ids).features)
        sums, _ = block_losses(
            draft_config,
            params,
            target_params["embed_tokens"],
            head_weight(target_params),
            features,
            input_ids,
            loss_mask,
            lengths,
            anchor_pos,
            keep_mask,
            objective.loss_decay_gamma,
            0.0,
            objective.head_chunk,
            compute_dtype,
        )
        return sums

    return micro_loss


def _apply_update(
    transform: optax.GradientTransformation, state: TrainState, grads: Params, learning_rate: Array, has_loss: Array
) -> tuple[Params, optax.OptState]:
    """Return updated parameters and moments, or the old ones where the batch had no loss at all."""
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    return jax.tree.map(
        lambda new, old: jnp.where(has_loss, new, old), (params, opt_state), (state.params, state.opt_state)
    )


def make_train_step(
    target_config: TargetConfig,
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    num_steps: int,
    compute_dtype: str = "float32",
    target_dtype: str = "float32",
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return the jitted `train_step(state, target_params, batch_ids, loss_mask, lengths) -> (state, metrics)`.

    Batch arrays are `[micro-steps, sequences, tokens]`, lengths `[micro-steps, sequences]`; the result does not depend
    on how a batch is split into micro-steps. `num_steps` is the length of the run, which both schedules span. The
    state is donated: the one passed in is gone. A batch without an anchor changes nothing but the step count.

    The metrics are those of `compute_metrics`, and `base_weight`, `learning_rate`, `grad_norm` (before clipping),
    `loss_weight` (the global sum of weights) and `num_blocks` (blocks with a scored slot).
    """
    micro_loss = _make_micro_loss(target_config, draft_config, objective, compute_dtype, target_dtype)
    transform = build_optimizer(optimizer)
    base_weights = base_weight_schedule(objective, num_steps)
    learning_rates = learning_rate_schedule(optimizer, num_steps)

    @in_full_precision
    def train_step(
        state: TrainState,
        target_params: Params,
        batch_ids: Int[Array, "M B S"],
        loss_mask: Float[Array, "M B S"],
        lengths: Int[Array, "M B"],
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
        base_weight = base_weights(state.step)

        def objective_sum(params: Params, *inputs: Array) -> tuple[Array, LossSums]:
            sums = micro_loss(params, target_params, key, *inputs)
            return mix_losses(sums, base_weight), sums

        def accumulate(carry: tuple[Params, LossSums], inputs: tuple[Array, ...]) -> tuple[tuple, None]:
            grads, sums = jax.grad(objective_sum, has_aux=True)(state.params, *inputs)
            return (jax.tree.map(jnp.add, carry[0], grads), add_sums(carry[1], sums)), None

        first_sequences = jnp.arange(batch_ids.shape[0]) * batch_ids.shape[1]
        start = (jax.tree.map(jnp.zeros_like, state.params), zero_sums(draft_config))
        (grads, sums), _ = jax.lax.scan(accumulate, start, (first_sequences, batch_ids, loss_mask, lengths))
        has_loss = sums.loss_den > 0
        grads = jax.tree.map(lambda g: g / jnp.where(has_loss, sums.loss_den, 1.0), grads)
        learning_rate = learning_rates(state.step)
        params, opt_state = _apply_update(transform, state, grads, learning_rate, has_loss)
        metrics = compute_metrics(sums, base_weight) | {
            "base_weight": base_weight,
            "learning_rate": learning_rate,
            "grad_norm": optax.tree.norm(grads),
            "loss_weight": sums.loss_den,
            "num_blocks": sums.accept_den,
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    target_config: TargetConfig,
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    compute_dtype: str = "float32",
    target_dtype: str = "float32",
) -> Callable[..., LossSums]:
    """Return the jitted `eval_step(params, target_params, input_ids, loss_mask, lengths, key) -> LossSums`.

    It scores `[sequences, tokens]` teacher-forced, without an update. Add the sums of several batches with
    `add_sums` and read them with `compute_metrics`; the same key draws the same anchors.
    """
    micro_loss = _make_micro_loss(target_config, draft_config, objective, compute_dtype, target_dtype)

    @in_full_precision
    def eval_step(
        params: Params,
        target_params: Params,
        input_ids: Int[Array, "B S"],
        loss_mask: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        key: Array,
    ) -> LossSums:
        return micro_loss(params, target_params, key, jnp.zeros((), jnp.int32), input_ids, loss_mask, lengths)

    return jax.jit(eval_step)
