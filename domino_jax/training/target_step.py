"""Training of a small target from scratch: what the embedded default needs before a drafter can be trained.

In: token ids with a loss mask. Out: a state whose parameters are a Qwen3 target, trained by next-token cross-entropy on
the assistant's tokens from weights that can already copy (`copy_init`).
Knows nothing about tokenizers, files or the drafter.

Source: AdamW, Loshchilov and Hutter, arXiv 1711.05101; the rates were chosen by measurement on the embedded corpus.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from domino_jax.config import TargetConfig
from domino_jax.models.qwen3 import Qwen3, init_target_params
from domino_jax.ops.precision import in_full_precision
from domino_jax.ops.ranking import first_argmax
from domino_jax.shapes import Array, Float, Int, Params
from domino_jax.training.copy_init import seed_copying


@flax.struct.dataclass
class TargetState:
    """What target training carries from step to step.

    Attributes:
        step: optimizer steps done.
        params: float32 target parameters.
        opt_state: the optimizer's state; its structure follows `make_target_optimizer`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def make_target_optimizer(
    learning_rate: float, num_steps: int, warmup_ratio: float = 0.05
) -> optax.GradientTransformation:
    """Return AdamW with linear warm-up and cosine decay to 0, gradients clipped by their global norm."""
    peak = max(1, round(warmup_ratio * num_steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, peak, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


@partial(jax.jit, static_argnames=("config", "optimizer"))
def create_target_state(config: TargetConfig, optimizer: optax.GradientTransformation, key: Array) -> TargetState:
    """Return freshly drawn parameters that can already copy (see `seed_copying`), with an empty optimizer state.

    Raises:
        ConfigError: the target is too small for a copying start.
    """
    draw_key, seed_key = jax.random.split(key)
    params = seed_copying(init_target_params(config, draw_key), config, seed_key)
    return TargetState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def target_loss(
    config: TargetConfig,
    params: Params,
    input_ids: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    lengths: Int[Array, " B"],
    prompt_weight: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the weighted mean cross-entropy and the accuracy on assistant tokens.

    A token weighs 1 where `loss_mask` is 1, `prompt_weight` elsewhere, 0 at padding: sum(w * ce) / sum(w).
    """
    model = Qwen3(config)
    hidden = model.apply({"params": params}, input_ids[:, :-1]).hidden
    logits = model.apply({"params": params}, hidden, method="logits")
    labels, answer = input_ids[:, 1:], loss_mask[:, 1:]
    is_token = jnp.arange(1, input_ids.shape[1]) < lengths[:, None]
    weights = jnp.where(is_token, jnp.maximum(answer, prompt_weight), 0.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    accuracy = jnp.sum((first_argmax(logits) == labels) * answer) / jnp.maximum(jnp.sum(answer), 1.0)
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0), accuracy


@partial(jax.jit, static_argnames=("config", "optimizer", "prompt_weight"), donate_argnames="state")
@in_full_precision
def target_train_step(
    state: TargetState,
    input_ids: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    config: TargetConfig,
    optimizer: optax.GradientTransformation,
    prompt_weight: float = 0.0,
) -> tuple[TargetState, dict[str, Float[Array, ""]]]:
    """Return the next state and `loss`, `accuracy`; `state` is donated.

    Compiles once for each shape of `input_ids` and each `optimizer` object.
    """
    loss_fn = partial(target_loss, config)
    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, input_ids, loss_mask, lengths, prompt_weight
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TargetState(state.step + 1, params, opt_state), {"loss": loss, "accuracy": accuracy}
