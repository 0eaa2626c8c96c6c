"""The jitted training step of a drafter, and the state they carry.

A step takes token ids, a loss mask and lengths, split into micro-steps, runs the frozen target on them to get its
features (or takes features computed before), draws anchors, sums losses and gradients over the micro-steps, divides
once by the weight of the whole batch and applies the clipped update, unless it is not finite. It knows nothing about
files, tokenizers or progress. This is the only jit of the drafter's training.

Source: Domino, arXiv 2605.29707; AdamW, arXiv 1711.05101; Muon, arXiv 2502.16982.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import head_weight
from domino_jax.models.stacked_target import run_stacked
from domino_jax.ops.precision import in_full_precision
from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.shapes import Array, Params
from domino_jax.sharding import Layout
from domino_jax.training.anchors import choose_anchors
from domino_jax.training.loss import (
    LossSums,
    add_sums,
    block_losses,
    compute_metrics,
    divide_or_zero,
    mix_losses,
    zero_sums,
)
from domino_jax.training.schedule import base_weight_schedule, learning_rate_schedule


@flax.struct.dataclass
class TrainState:
    """Everything of a drafter's training that changes from step to step, and the key it draws from.

    Attributes:
        step: int32 scalar: optimizer steps done, batches without a single anchor included.
        params: the drafter's float32 master weights.
        opt_state: moments of the optimizer.
        key_data: uint32 bits of the PRNG key; it stays as it is, every draw folds step and sequence number into it.
        num_skipped: int32 scalar: updates left out because they were not finite.
        skipped_in_row: int32 scalar: those of them since the last finite one.
    """

    # Leaves are open: checkpointing puts host arrays, shapes and placements into the same tree.
    step: Any
    params: Params
    opt_state: optax.OptState
    key_data: Any
    num_skipped: Any
    skipped_in_row: Any


@flax.struct.dataclass
class StepInputs:
    """The batch of one optimizer step: numpy or device arrays whose first axes are micro-steps and sequences.

    Attributes:
        input_ids, loss_mask, lengths: as in `records.TrainBatch`.
        features: captured streams of the target; None: the step runs the target itself.
        last_hidden: the target's final-normed states, beside `features` where the objective matches distributions.
        numbers: int32, each sequence's number in the batch, which its anchors depend on; None: in order.
    """

    # Leaves are open: host arrays come in, tracers and shapes pass through.
    input_ids: Any
    loss_mask: Any
    lengths: Any
    features: Any = None
    last_hidden: Any = None
    numbers: Any = None


def pad_sequences(inputs: StepInputs, multiple: int) -> StepInputs:
    """Return host inputs whose every micro-step holds a multiple of `multiple` sequences.

    What is added is empty and weighs nothing; the others keep their anchors.
    """
    num_micro, num_sequences = inputs.lengths.shape
    num_added = -num_sequences % multiple
    if num_added == 0:
        return inputs
    numbers = np.arange(num_micro * num_sequences, dtype=np.int32).reshape(num_micro, num_sequences)
    return jax.tree.map(
        lambda x: np.pad(x, ((0, 0), (0, num_added)) + ((0, 0),) * (x.ndim - 2)), inputs.replace(numbers=numbers)
    )


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return clipping and the optimizer without its learning rate, which the step multiplies in; norms never decay."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    if config.kind == "muon":
        # Its own rate of 1 leaves the schedule to the step; it returns descents, the step subtracts.
        muon = optax.contrib.muon(
            1.0,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_choose_muon_weights,
            consistent_rms=_MUON_RMS,
        )
        return optax.chain(clip, muon, optax.scale(-1.0))
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_matrix)
    return optax.chain(
        clip, optax.scale_by_adam(config.b1, config.b2), decay if config.weight_decay > 0 else optax.identity()
    )


_MUON_RMS = 0.2
"""Root mean square of a Muon update, that of a typical AdamW one. Source: arXiv 2502.16982."""


def _is_matrix(params: Params) -> Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _choose_muon_weights(params: Params) -> Params:
    """Return a marker for every matrix but the head's map to the vocabulary, which is an output layer."""
    numbers = jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers() if p.ndim == 2 else None, params)
    return numbers | {"head": numbers["head"] | {"up": None}} if "head" in numbers else numbers


def create_train_state(
    draft_config: DraftConfig,
    optimizer: OptimizerConfig,
    key: Array,
    params: Params | None = None,
    layout: Layout | None = None,
) -> TrainState:
    """Return the state before the first step; `params` continues from a drafter instead of a fresh one.

    `key` is a typed key (`jax.random.key`). The state owns copies: `params` may be used afterwards. With a layout every
    array is made where it will live.
    """
    init_key, anchor_key = jax.random.split(key)
    transform = build_optimizer(optimizer)
    if params is None:
        init = partial(init_draft_params, draft_config)
        params = jax.jit(init, out_shardings=_out_shardings(layout, init, init_key))(init_key)
    elif layout:
        params = layout.place(params)
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(transform.init, out_shardings=_out_shardings(layout, transform.init, params))(params),
        key_data=jax.random.key_data(anchor_key),
        num_skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )
    return layout.place(state) if layout else state


def _out_shardings(layout: Layout | None, function: Callable[..., Any], *arguments: Any) -> Any:
    return None if layout is None else layout.shardings(jax.eval_shape(function, *arguments))


def _draw_anchors(key: Array, numbers: Array, loss_mask: Array, num_anchors: int) -> tuple[Array, Array]:
    """Draw the anchors of some sequences of a batch; a sequence's key depends on its number in the batch alone."""
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
    run_target = partial(
        run_stacked, target_config, draft_config.target_layer_ids, objective.match != "none", jnp.dtype(target_dtype)
    )

    def micro_loss(params: Params, target_params: Params, key: Array, numbers: Array, inputs: StepInputs) -> LossSums:
        is_token = jnp.arange(inputs.input_ids.shape[1]) < inputs.lengths[:, None]
        loss_mask = jnp.where(is_token, inputs.loss_mask, 0.0)
        anchor_pos, keep_mask = _draw_anchors(key, numbers, loss_mask, objective.num_anchors)
        features, last_hidden = inputs.features, inputs.last_hidden
        if features is None:
            features, last_hidden = run_target(target_params, inputs.input_ids)
        elif last_hidden is not None:
            last_hidden = last_hidden.astype(target_dtype)  # the head is multiplied in the type it would have online
        return block_losses(
            draft_config,
            objective,
            params,
            target_params["embed_tokens"],
            head_weight(target_params),
            features,
            inputs.input_ids,
            loss_mask,
            inputs.lengths,
            anchor_pos,
            keep_mask,
            compute_dtype,
            last_hidden,
        )

    return micro_loss


def _apply_update(
    transform: optax.GradientTransformation, state: TrainState, grads: Params, learning_rate: Array, is_usable: Array
) -> tuple[Params, optax.OptState]:
    """Return updated parameters and moments, or the old ones where the update is not usable."""
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    return jax.tree.map(
        lambda new, old: jnp.where(is_usable, new, old), (params, opt_state), (state.params, state.opt_state)
    )


def _sum_gradients(
    micro_loss: Callable[..., LossSums],
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    layout: Layout | None,
    state: TrainState,
    target_params: Params,
    inputs: StepInputs,
    base_weight: Array,
) -> tuple[Params, LossSums]:
    """Return the gradient of the whole batch's loss and its sums, from one micro-step after the other."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)

    def part_sums(params: Params, frozen: Params, *arguments: Any) -> tuple[list[Array], LossSums]:
        sums = micro_loss(params, frozen, key, *arguments)
        return [numerator for numerator, _ in mix_losses(objective, sums, base_weight)], sums

    def accumulate(carry: tuple[list[Params], LossSums], arguments: tuple) -> tuple[tuple, None]:
        params, frozen = state.params, target_params
        if layout and layout.fsdp:
            # Tied to the micro-step: the compiler would gather all parameters before the loop, and keep them.
            params, frozen, arguments = jax.lax.optimization_barrier((params, frozen, arguments))
        parts, pull_back, sums = jax.vjp(lambda p: part_sums(p, frozen, *arguments), params, has_aux=True)
        grads = [pull_back([jnp.float32(i == j) for j in range(len(parts))])[0] for i in range(len(parts))]
        grads = [layout.constrain(part) for part in grads] if layout else grads
        return (jax.tree.map(jnp.add, carry[0], grads), add_sums(carry[1], sums)), None

    num_parts = len(mix_losses(objective, zero_sums(draft_config), 0.0))
    num_micro, num_sequences = inputs.lengths.shape
    numbers = inputs.numbers
    if numbers is None:
        numbers = jnp.arange(num_micro * num_sequences).reshape(num_micro, num_sequences)
    start = ([jax.tree.map(jnp.zeros_like, state.params)] * num_parts, zero_sums(draft_config))
    (part_grads, sums), _ = jax.lax.scan(accumulate, start, (numbers, inputs.replace(numbers=None)))
    scales = [divide_or_zero(jnp.ones(()), den) for _, den in mix_losses(objective, sums, base_weight)]
    grads = jax.tree.map(lambda *leaves: sum(s * g for s, g in zip(scales, leaves, strict=True)), *part_grads)
    return grads, sums


def make_train_step(
    target_config: TargetConfig,
    draft_config: DraftConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    num_steps: int,
    compute_dtype: str = "float32",
    target_dtype: str = "float32",
    layout: Layout | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return the jitted `train_step(state, target_params, inputs: StepInputs) -> (state, metrics)`.

    The result does not depend on how a batch is split into micro-steps. `num_steps` is the length of the run, which
    both schedules span. The state is donated: the one passed in is gone. `target_params` have their layers stacked
    (`stack_params`); where the inputs hold features, embedding and output head are enough. A batch without an anchor
    changes nothing but the step count, one whose loss or gradient is not finite the count of skipped updates too.

    With a layout it is called, or lowered, where `sharding.activate(layout)` holds, on trees that `layout.place` (or
    `abstract`) returned; the state keeps its place.

    The metrics are those of `compute_metrics`, and `base_weight`, `learning_rate`, `grad_norm` (before clipping),
    `loss_weight` (the global sum of weights), `num_blocks` (blocks with a scored slot), `num_skipped` and
    `skipped_in_row` as in the state.
    """
    micro_loss = _make_micro_loss(target_config, draft_config, objective, compute_dtype, target_dtype)
    sum_gradients = partial(_sum_gradients, micro_loss, draft_config, objective, layout)
    transform = build_optimizer(optimizer)
    base_weights = base_weight_schedule(objective, num_steps)
    learning_rates = learning_rate_schedule(optimizer, num_steps)

    @in_full_precision
    def train_step(state: TrainState, target_params: Params, inputs: StepInputs) -> tuple[TrainState, dict[str, Array]]:
        base_weight = base_weights(state.step)
        grads, sums = sum_gradients(state, target_params, inputs, base_weight)
        metrics = compute_metrics(objective, sums, base_weight)
        grad_norm = optax.tree.norm(grads)
        has_loss, is_finite = sums.loss_den > 0, jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        learning_rate = learning_rates(state.step)
        params, opt_state = _apply_update(transform, state, grads, learning_rate, has_loss & is_finite)
        num_skipped = state.num_skipped + jnp.where(is_finite, 0, 1)
        skipped_in_row = jnp.where(is_finite, 0, state.skipped_in_row + 1)
        metrics |= {
            "base_weight": base_weight,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "loss_weight": sums.loss_den,
            "num_blocks": sums.accept_den,
            "num_skipped": num_skipped,
            "skipped_in_row": skipped_in_row,
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            num_skipped=num_skipped,
            skipped_in_row=skipped_in_row,
        )
        return (layout.constrain(state), layout.replicate(metrics)) if layout else (state, metrics)

    return jax.jit(train_step, donate_argnums=0)
