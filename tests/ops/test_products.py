"""Products of few rows against numpy, and the programs that a CPU gets for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.ops import cpu_kernels
from domino_jax.ops.products import multiply, multiply_turned

ON_A_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU's program")


@pytest.fixture(params=["kernels", "XLA"])
def with_and_without_kernels(request, monkeypatch):
    if request.param == "XLA":
        leave_to_xla(monkeypatch)


def leave_to_xla(monkeypatch):
    """Make products as they are made where there is no compiler."""
    monkeypatch.setattr(cpu_kernels, "has_kernels_for", lambda dtype: False)


@pytest.fixture(autouse=True)
def traced_anew():
    """Which kind of product a program has is decided when it is traced."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "shape", [(24,), (1, 24), (1, 1, 24), (1, 22), (2, 24), (3, 24), (1, 8, 24), (2, 3, 5, 24), (32, 24), (33, 24)]
)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_multiply(shape):
    x, weight = draw(*shape), draw(shape[-1], 10, seed=1)
    got = jax.jit(multiply)(x, weight)
    assert got.shape == (*shape[:-1], 10)
    np.testing.assert_allclose(got, x @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_gradients_of_multiplied_rows():
    x, weight, out = draw(2, 4, 24), draw(24, 10, seed=1), draw(2, 4, 10, seed=2)
    _, pull_back = jax.vjp(jax.jit(multiply), x, weight)
    expected = out @ weight.T, np.einsum("bti,bto->io", x, out)
    for got, want in zip(pull_back(out), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_single_row_of_16_bit_numbers_is_summed_in_float32():
    x = jnp.asarray(draw(1, 4096), jnp.bfloat16)
    weight = jnp.asarray(draw(4096, 8, seed=1), jnp.bfloat16)
    got = jax.jit(multiply)(x, weight)
    assert got.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-2)


@ON_A_CPU
def test_single_row_is_multiplied_in_parts(monkeypatch):
    leave_to_xla(monkeypatch)
    program = jax.jit(multiply).lower(draw(1, 24), draw(24, 10)).compile().as_text()
    assert re.search(r"f32\[4,(1,)?10\]\S* dot\(", program)


@ON_A_CPU
def test_few_rows_are_kept_from_the_library_that_packs_weights(monkeypatch):
    leave_to_xla(monkeypatch)
    if "ynn_fusion" not in jax.jit(jnp.matmul).lower(draw(8, 64), draw(64, 512)).compile().as_text():
        pytest.skip("this XLA gives the library nothing")
    program = jax.jit(multiply).lower(draw(8, 64), draw(64, 512)).compile().as_text()
    assert "ynn_fusion" not in program


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.usefixtures("with_and_without_kernels")
def test_multiply_turned(num_rows):
    x, weight = draw(1, num_rows, 24), draw(30, 24, seed=1)
    got = jax.jit(multiply_turned)(x, weight)
    assert got.shape == (1, num_rows, 30)
    np.testing.assert_allclose(got, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("with_and_without_kernels")
def test_gradients_of_multiply_turned(dtype):
    x, weight, out = (jnp.asarray(draw(*shape), dtype) for shape in ((2, 3, 24), (30, 24), (2, 3, 30)))
    result, pull_back = jax.vjp(multiply_turned, x, weight)
    assert result.dtype == jnp.float32
    gradients = pull_back(out.astype(jnp.float32))
    expected = jnp.einsum("bto,oi->bti", out, weight), jnp.einsum("bto,bti->oi", out, x)
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=1e-5)


@ON_A_CPU
def test_turned_weight_is_the_left_factor(monkeypatch):
    leave_to_xla(monkeypatch)
    program = jax.jit(multiply_turned).lower(draw(7, 64), draw(512, 64)).compile().as_text()
    assert re.search(r"f32\[512,8\]\S* dot\(", program)
