"""The decoder layer that target and draft share: RMSNorm, grouped-query attention with q/k-norm, SwiGLU.

Parameters are plain arrays; linear weights are `[in, out]`. A layer offers its parts
(queries, keys and values, output, MLP) so that target and drafter can put their own attention between them.

Source: Hugging Face `Qwen3DecoderLayer`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.ops.attention import apply_rope, attend_causal
from domino_jax.ops.products import cast_weight, multiply
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain, gather_parameter

_T = TypeVar("_T")

INIT_STDDEV = 0.02
"""Standard deviation of freshly drawn weights. Source: `initializer_range` of the public Qwen3 configs."""


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Scale `x` to unit root mean square, then by `weight`; the mean is taken in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


class DecoderLayer(nn.Module):
    """One Qwen3 decoder layer in parts.

    Attributes:
        residual_scale: factor on the initial spread of the two output projections (1 / sqrt(2 x layers) keeps the
            residual stream's size independent of depth).
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    residual_scale: float = 1.0
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Declare the parameters."""
        width, head_dim = self.hidden_size, self.head_dim
        query_width, kv_width = self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim
        normal = nn.initializers.normal(INIT_STDDEV)
        output = nn.initializers.normal(INIT_STDDEV * self.residual_scale)
        ones = nn.initializers.ones
        self.input_layernorm = self.param("input_layernorm", ones, (width,))
        self.q_proj = self.param("q_proj", normal, (width, query_width))
        self.k_proj = self.param("k_proj", normal, (width, kv_width))
        self.v_proj = self.param("v_proj", normal, (width, kv_width))
        self.o_proj = self.param("o_proj", output, (query_width, width))
        self.q_norm = self.param("q_norm", ones, (head_dim,))
        self.k_norm = self.param("k_norm", ones, (head_dim,))
        self.post_attention_layernorm = self.param("post_attention_layernorm", ones, (width,))
        self.gate_proj = self.param("gate_proj", normal, (width, self.intermediate_size))
        self.up_proj = self.param("up_proj", normal, (width, self.intermediate_size))
        self.down_proj = self.param("down_proj", output, (self.intermediate_size, width))

    def normed_input(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Return `x` as the attention projections read it."""
        return rms_norm(x, self.input_layernorm, self.rms_norm_eps)

    def queries(self, normed: Float[Array, "*batch T D"], positions: Int[Array, "*batch T"]) -> Float[Array, "..."]:
        """Return rotated queries `[..., T, N, H]` of normed states."""
        heads = multiply(normed, self._weight("q_proj")).reshape(*normed.shape[:-1], -1, self.head_dim)
        heads = constrain(heads, "heads")
        return apply_rope(rms_norm(heads, self.q_norm, self.rms_norm_eps), positions, self.rope_theta)

    def keys_values(
        self, states: Float[Array, "*batch T D"], positions: Int[Array, "*batch T"]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return rotated keys and values, each `[..., T, K, H]`, of states that need no further norm."""
        shape = (*states.shape[:-1], -1, self.head_dim)
        keys = constrain(multiply(states, self._weight("k_proj")).reshape(shape), "kv_heads")
        values = constrain(multiply(states, self._weight("v_proj")).reshape(shape), "kv_heads")
        return apply_rope(rms_norm(keys, self.k_norm, self.rms_norm_eps), positions, self.rope_theta), values

    def run_causal(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the layer's output on whole sequences, every token seeing those up to itself."""
        normed = self.normed_input(x)
        mixed = attend_causal(self.queries(normed, positions), *self.keys_values(normed, positions))
        return self.finish(x, mixed)

    def finish(self, x: Float[Array, "*batch T D"], mixed: Float[Array, "*batch T N H"]) -> Float[Array, "..."]:
        """Return the layer's output `[..., T, D]` from its input and the attention's result."""
        mixed = constrain(mixed, "heads").reshape(*mixed.shape[:-2], -1)
        x = constrain(x + multiply(mixed, self._weight("o_proj")), "states")
        normed = rms_norm(x, self.post_attention_layernorm, self.rms_norm_eps)
        gate = jax.nn.silu(multiply(normed, self._weight("gate_proj")))
        inner = constrain(gate * multiply(normed, self._weight("up_proj")), "mlp")
        return constrain(x + multiply(inner, self._weight("down_proj")), "states")

    def _weight(self, name: str) -> Array:
        return gather_parameter(cast_weight(getattr(self, name), self.dtype), f"layers_0/{name}")


def run_traced_once(function: Callable[..., _T], layer: DecoderLayer, *arguments: Any) -> _T:
    """Return `function(layer, *arguments)`; of layers with equal sizes and shapes only the first is traced.

    XLA puts every call back in its place, so programs stay what they were; only tracing and lowering a deep model takes
    less time. `function` must be one of a Python module: traces are kept by it.
    """
    return _run_traced_once(function, *layer.unbind(), *arguments)


@partial(jax.jit, static_argnums=(0, 1))
def _run_traced_once(function: Callable[..., _T], layer: DecoderLayer, variables: Any, *arguments: Any) -> _T:
    return layer.apply(variables, *arguments, method=function)


def make_layer(config: TargetConfig | DraftConfig, dtype: jnp.dtype, residual_scale: float = 1.0) -> DecoderLayer:
    """Return an unbound layer with the sizes of a target or of a drafter."""
    return DecoderLayer(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
        config.rope_theta,
        residual_scale=residual_scale,
        dtype=dtype,
    )
