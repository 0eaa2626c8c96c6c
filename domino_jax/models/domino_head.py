"""The Domino head: a GRU over the tokens drafted so far and a low-rank residual on the base logits.

    logits_k = b_k + up^T silu(down^T [z_k ; s])

`z_k` is the backbone's state of the slot, `s` the GRU's state after the anchor and every token before the slot's
label. Everything else of a drafter runs for the whole block at once; only this is sequential.

Source: Domino, arXiv 2605.29707; `code/dflash.py` of jianuo-huang/Domino for gate order and concatenation order.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config import DraftConfig
from domino_jax.models.draft_backbone import init_backbone_params
from domino_jax.models.layers import INIT_STDDEV
from domino_jax.ops.products import cast_weight, einsum_in_float32, multiply
from domino_jax.shapes import Array, Float, Params
from domino_jax.sharding import constrain, gather_parameter


class DominoHead(nn.Module):
    """GRU cell (gates r, z, n; no biases) and rank-E correction.

    Attributes:
        dtype: type of the activations; parameters are cast to it where they are used.
        num_choices: tokens whose logits are corrected; 0: the whole vocabulary.
    """

    config: DraftConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    num_choices: int = 0

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        width, gru, rank = c.hidden_size, c.gru_hidden_dim, c.emb_dim
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.gru_input = self.param("gru_input", uniform, (width, 3 * gru))
        self.gru_hidden = self.param("gru_hidden", uniform, (gru, 3 * gru))
        self.down = self.param("down", uniform, (width + gru, rank))
        self.up = self.param("up", nn.initializers.normal(INIT_STDDEV), (rank, self.num_choices or c.vocab_size))

    def init_state(self, batch_shape: tuple[int, ...]) -> Float[Array, "*batch R"]:
        """Return the GRU's start state, 0."""
        return jnp.zeros((*batch_shape, self.config.gru_hidden_dim), self.dtype)

    def step(self, state: Float[Array, "*batch R"], embedding: Float[Array, "*batch D"]) -> Float[Array, "*batch R"]:
        """Return the GRU's state after reading one more token embedding."""
        return update_state(state, self.input_gates(embedding), state @ self._weight("gru_hidden"))

    def input_gates(self, embedding: Float[Array, "*batch D"]) -> Float[Array, "*batch gates"]:
        """Return the part of the GRU's three gates that depends on the token read alone."""
        return multiply(embedding.astype(self.dtype), self._weight("gru_input"))

    def project_state(
        self, state: Float[Array, "*batch R"]
    ) -> tuple[Float[Array, "*batch gates"], Float[Array, "*batch E"]]:
        """Return what a state gives to the gates of the step after it and to its own correction, in one product."""
        weight = jnp.concatenate([self._weight("gru_hidden"), self._weight("down")[self.config.hidden_size :]], axis=-1)
        gates, inner = jnp.split(multiply(state, weight), [self.gru_hidden.shape[-1]], axis=-1)
        return gates, inner

    def teacher_states(self, embeddings: Float[Array, "*batch T D"]) -> Float[Array, "*batch T R"]:
        """Return the state after each of T given tokens."""
        input_gates, weight = self.input_gates(embeddings), self._weight("gru_hidden")
        states, state = [], self.init_state(embeddings.shape[:-2])
        for t in range(embeddings.shape[-2]):
            state = update_state(state, input_gates[..., t, :], state @ weight)
            states.append(state)
        return jnp.stack(states, axis=-2)

    def project_hidden(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        """Return the part of the correction's inner product that depends on the slot's state alone."""
        return multiply(hidden.astype(self.dtype), self._weight("down")[: self.config.hidden_size])

    def expand(self, inner: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Return the float32 residual of the correction's inner states."""
        if self.dtype == jnp.float32:
            return constrain(multiply(inner, self._weight("up")), "logits")
        return constrain(einsum_in_float32("...e,ev->...v", inner, self._weight("up")), "logits")

    def correct(self, hidden: Float[Array, "*batch D"], state: Float[Array, "*batch R"]) -> Float[Array, "*batch V"]:
        """Return the float32 residual on the base logits of slots with states `hidden`."""
        inner = self.project_hidden(hidden) + state @ self._weight("down")[self.config.hidden_size :]
        return self.expand(jax.nn.silu(inner))

    def _weight(self, name: str) -> Array:
        return gather_parameter(cast_weight(getattr(self, name), self.dtype), f"head/{name}")

    def _touch_all(self, hidden: Array) -> Array:
        return self.correct(hidden, self.step(self.init_state(hidden.shape[:-1]), hidden))


def update_state(
    state: Float[Array, "*batch R"],
    input_gates: Float[Array, "*batch gates"],
    state_gates: Float[Array, "*batch gates"],
) -> Float[Array, "*batch R"]:
    """Return the GRU's next state; the gates hold reset, update and new, from the token read and from the state."""
    reset_in, update_in, new_in = jnp.split(input_gates, 3, axis=-1)
    reset_state, update_gate_state, new_state = jnp.split(state_gates, 3, axis=-1)
    reset = jax.nn.sigmoid(reset_in + reset_state)
    update = jax.nn.sigmoid(update_in + update_gate_state)
    return (1 - update) * jnp.tanh(new_in + reset * new_state) + update * state


def init_draft_params(config: DraftConfig, key: Array) -> Params:
    """Return freshly drawn float32 drafter parameters: `backbone`, and `head` where the drafter has one."""
    backbone_key, head_key = jax.random.split(key)
    params = {"backbone": init_backbone_params(config, backbone_key)}
    if config.has_head:
        hidden = jnp.zeros((1, config.hidden_size))
        params["head"] = DominoHead(config).init(head_key, hidden, method="_touch_all")["params"]
    return params
