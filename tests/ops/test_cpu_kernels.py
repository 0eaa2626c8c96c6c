"""Kernels of a CPU against numpy in 64 bits, in programs, and where they cannot be compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.checkpoints.huggingface import save_target
from domino_jax.config import TargetConfig
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
from domino_jax.models.qwen3 import init_target_params
from domino_jax.ops import cpu_kernels
from domino_jax.ops.cached_attention import _attend_written, attend_cached, write_then_attend
from domino_jax.ops.kv_cache import init_cache
from domino_jax.ops.products import multiply, multiply_turned

KERNELS = [
    pytest.param(cpu_kernels.multiply_rows, False, id="multiply_rows"),
    pytest.param(cpu_kernels.multiply_turned_rows, True, id="multiply_turned_rows"),
]
# Widths that fill no vector, no step and no part, several parts each way, and columns that threads share.
SIZES = [(1, 1), (0, 4), (4, 0), (3, 5), (7, 33), (130, 31), (257, 100), (640, 128), (2050, 67), (64, 4100), (0, 600)]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if jax.default_backend() != "cpu" or os.environ.get("DOMINO_JAX_KERNELS") == "0":
        pytest.skip("not for kernels of a CPU")
    if os.environ.get("CXX") is None and not any(map(shutil.which, cpu_kernels._COMPILERS)):
        pytest.skip("no C++ compiler")
    assert cpu_kernels.has_kernels_for("float32")


@pytest.fixture
def enable_x64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_factors(num_rows, num_in, num_out, is_turned, weight_type="float32"):
    """Return rows, a weight, and their product in 64 bits."""
    x, weight = draw(num_rows, num_in), jnp.asarray(draw(num_in, num_out, seed=1), weight_type)
    product = x.astype(np.float64) @ np.asarray(weight, np.float64)
    return jnp.asarray(x), weight.T if is_turned else weight, product


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 12, 16, 17, 40, 300])
@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_product(kernel, is_turned, weight_type, num_rows):
    for num_in, num_out in SIZES:
        x, weight, product = draw_factors(num_rows, num_in, num_out, is_turned, weight_type)
        # Sums of numbers of size one: rounding grows with their root, a wrong number would be off by as much as one.
        np.testing.assert_allclose(jax.jit(kernel)(x, weight), product, rtol=1e-5, atol=4e-6 * num_in**0.5 + 1e-6)


@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_a_row_is_the_same_alone_and_among_others(kernel, is_turned):
    """So a verify pass of any width up to 128 rows gives the logits of plain steps, but for its attention."""
    x, weight, _ = draw_factors(128, 1030, 75, is_turned)
    whole = np.asarray(kernel(x, weight))
    for num_rows in (1, 5, 9, 16, 17, 50):
        np.testing.assert_array_equal(kernel(x[:num_rows], weight), whole[:num_rows])


@pytest.mark.parametrize("num_rows", [1, 16, 17, 128])
def test_bfloat16_weights_give_what_they_give_as_float32(num_rows):
    x, weight, _ = draw_factors(num_rows, 300, 70, False, "bfloat16")
    multiply_rows = cpu_kernels.multiply_rows
    np.testing.assert_array_equal(multiply_rows(x, weight), multiply_rows(x, weight.astype(jnp.float32)))


def test_odd_bfloat16_numbers_keep_their_value():
    numbers = jnp.asarray([1e-37, -1e-37, jnp.inf, -jnp.inf, jnp.nan, 0.0, -3.0, 1e38], jnp.bfloat16)
    expected = np.asarray(numbers.astype(jnp.float32))
    for num_columns in (8, 40):  # a rest, and a whole block before it
        weight = jnp.tile(numbers, num_columns // 8)[None]
        np.testing.assert_array_equal(
            cpu_kernels.multiply_rows(jnp.ones((1, 1)), weight)[0], np.tile(expected, num_columns // 8)
        )


def test_rows_and_columns_of_a_table():
    table, ids = jnp.asarray(draw(40, 70), jnp.bfloat16), jnp.asarray([[0, 39, 5], [7, -3, 80]])
    wide = np.asarray(table.astype(jnp.float32))
    np.testing.assert_array_equal(cpu_kernels.take_rows(table, ids), wide[np.clip(ids, 0, 39)])
    many = jnp.arange(200).reshape(2, 100) % 75
    np.testing.assert_array_equal(jax.jit(cpu_kernels.take_columns)(table, many), wide.T[np.clip(many, 0, 69)])
    with pytest.raises(Exception, match="has no rows"):
        cpu_kernels.take_rows(table[:0], ids).block_until_ready()


@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_other_types_and_shapes_are_refused(kernel, is_turned):
    with pytest.raises(Exception, match="neither float32 nor bfloat16"):
        kernel(jnp.ones((2, 8)), jnp.ones((8, 8), jnp.float16)).block_until_ready()
    with pytest.raises(Exception, match="differ"):
        cpu_kernels._call("MultiplyRows", (2, 4), jnp.ones((2, 8)), jnp.ones((4, 4))).block_until_ready()


@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_product_is_the_same_every_time(kernel, is_turned, weight_type):
    x, weight, _ = draw_factors(8, 1024, 512, is_turned, weight_type)
    compiled = jax.jit(kernel)
    first = np.asarray(compiled(x, weight))
    for _ in range(50):
        np.testing.assert_array_equal(compiled(x, weight), first)


@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_what_is_no_number_stays_in_its_row(kernel, is_turned, weight_type):
    x, weight, product = draw_factors(5, 64, 96, is_turned, weight_type)
    got = np.asarray(kernel(x.at[2, 3].set(np.nan), weight))
    assert np.isnan(got[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(got[others], product[others], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_many_products_at_once(kernel, is_turned, weight_type):
    """Independent products run side by side in one program, in a loop, on threads that they share."""
    x, weight, product = draw_factors(4, 256, 320, is_turned, weight_type)
    weights = jnp.stack([weight * 2**i for i in range(8)])  # bfloat16 holds them as they are

    @jax.jit
    def run(x, weights):
        return jax.lax.fori_loop(
            0, 20, lambda _, sums: sums + jnp.stack([kernel(x, w) for w in weights]), jnp.zeros((8, 4, 320))
        )

    expected = 20 * np.stack([product * 2**i for i in range(8)])
    np.testing.assert_allclose(run(x, weights), expected, rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_derivatives(kernel, is_turned, weight_type):
    x, weight, _ = draw_factors(3, 20, 11, is_turned, weight_type)
    turned = (lambda w: w.T) if is_turned else (lambda w: w)
    directions = jnp.asarray(draw(*x.shape, seed=2)), jnp.asarray(draw(*weight.shape, seed=3), weight_type)
    _, forward = jax.jvp(kernel, (x, weight), directions)
    expected = directions[0] @ turned(weight) + x @ turned(directions[1])
    np.testing.assert_allclose(forward, expected, rtol=1e-4, atol=1e-4)


def draw_cache(num_rows, num_tokens, num_heads, num_kv, head_dim, num_positions):
    """Return queries, a cache and where each row's tokens start; what lies after them is no number."""
    queries = draw(num_rows, num_tokens, num_heads, head_dim) * 2
    keys = draw(num_rows, num_kv, head_dim, num_positions, seed=1)
    values = draw(num_rows, num_kv, num_positions, head_dim, seed=2)
    last = num_positions - num_tokens
    start = np.asarray([last * i // max(num_rows - 1, 1) for i in range(num_rows)], np.int32)
    for row, at in enumerate(start):
        keys[row, :, :, at + num_tokens :] = np.nan
        values[row, :, at + num_tokens :] = np.nan
    return tuple(map(jnp.asarray, (queries, keys, values, start)))


def attend_in_64_bits(queries, keys, values, start):
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    out = np.empty(queries.shape)
    per_group = queries.shape[2] // keys.shape[1]
    for b, t, n in np.ndindex(queries.shape[:3]):
        seen = int(start[b]) + t + 1
        scores = queries[b, t, n] @ keys[b, n // per_group, :, :seen] / queries.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values[b, n // per_group, :seen] / weights.sum()
    return out


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 1, 4, 2, 64, 256),  # a plain step; a chunk of positions, full
        (1, 8, 10, 2, 64, 700),  # a verify pass; groups of rows and chunks that are not full
        (3, 17, 6, 3, 33, 300),
        (2, 32, 8, 1, 128, 600),
        (4, 1, 2, 2, 5, 9),
        (40, 16, 1, 1, 8, 700),  # starts on both sides of a chunk's border: some rows of a group see nothing of a chunk
    ],
)
def test_attention(shape):
    inputs = draw_cache(*shape)
    got = jax.jit(cpu_kernels.attend_cached)(*inputs)
    np.testing.assert_allclose(got, attend_in_64_bits(*inputs), rtol=1e-5, atol=2e-5)


def test_attention_of_scores_far_apart():
    queries, keys, values, start = draw_cache(2, 8, 4, 2, 64, 800)
    inputs = queries * 200, keys, values, start
    np.testing.assert_allclose(cpu_kernels.attend_cached(*inputs), attend_in_64_bits(*inputs), rtol=1e-4, atol=1e-3)


def test_query_that_is_no_number_stays_in_its_row():
    queries, keys, values, start = draw_cache(2, 4, 4, 2, 64, 300)
    got = np.array(cpu_kernels.attend_cached(queries.at[1, 2, 3, 5].set(jnp.nan), keys, values, start))
    assert np.isnan(got[1, 2, 3]).all()
    expected = attend_in_64_bits(queries, keys, values, start)
    got[1, 2, 3] = expected[1, 2, 3]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [3, 259])  # in the first chunk of positions, in the second
def test_key_that_is_no_number_shows_as_with_xla(bad, place):
    queries, keys, values, start = draw_cache(1, 20, 2, 1, 16, 300)
    inputs = queries, jnp.nan_to_num(keys).at[0, 0, :, place].set(bad), jnp.nan_to_num(values), start + 250
    got, want = (np.asarray(f(*inputs)) for f in (cpu_kernels.attend_cached, _attend_written))
    assert np.isnan(want).any()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("enable_x64")
def test_wide_starts():
    queries, keys, values, start = draw_cache(2, 3, 2, 1, 16, 30)
    got = jax.jit(cpu_kernels.attend_cached)(queries, keys, values, start.astype(jnp.int64))
    np.testing.assert_allclose(got, attend_in_64_bits(queries, keys, values, start), rtol=1e-5, atol=2e-5)


def test_caches_that_do_not_fit_are_refused():
    queries, keys, values, start = draw_cache(2, 3, 4, 2, 16, 30)
    for inputs in [
        (queries[..., :8], keys, values, start),
        (queries[:, :, :3], keys, values, start),
        (queries, keys, values[:, :, :29], start),
        (queries, keys, values, start[:1]),
    ]:
        with pytest.raises(Exception, match="differ"):
            cpu_kernels._call("AttendCached", inputs[0].shape, *inputs).block_until_ready()


@pytest.mark.parametrize(("kernel", "is_turned"), KERNELS)
def test_factors_that_do_not_fit_are_refused(kernel, is_turned):
    x, weight, _ = draw_factors(3, 20, 11, is_turned)
    with pytest.raises(Exception, match="differ"):
        cpu_kernels._call(
            "MultiplyTurnedRows" if is_turned else "MultiplyRows", (3, 11), x[:, 1:], weight
        ).block_until_ready()


def test_programs_have_them():
    x, weight = jnp.asarray(draw(8, 64)), jnp.asarray(draw(64, 512))
    for num_rows, function, factor, is_there in [
        (1, multiply, weight, True),
        (128, multiply, weight, True),
        (129, multiply, weight, False),
        (16, multiply_turned, weight.T, True),
        (128, multiply_turned, weight.T, True),
        (129, multiply_turned, weight.T, False),
        (16, multiply, weight.astype(jnp.bfloat16), True),
        (300, multiply, weight.astype(jnp.bfloat16), True),
        (300, multiply_turned, weight.T.astype(jnp.bfloat16), True),
    ]:
        rows = jnp.resize(x, (num_rows, 64))
        program = jax.jit(function).lower(rows, factor).compile().as_text()
        assert ("domino_jax." in program) == is_there, (function, num_rows)
    assert "domino_jax." not in jax.jit(multiply).lower(jnp.bfloat16(x), jnp.bfloat16(weight)).compile().as_text()


RUN = """
import numpy as np, jax
from domino_jax.ops import cpu_kernels
from domino_jax.ops.products import multiply
product = jax.jit(multiply)(np.ones((2, 8), np.float32), np.ones((8, 4), np.float32))
print(cpu_kernels.has_kernels_for('float32'), float(product.sum()))
"""


def run_with(tmp_path, **environment):
    """Run two products of ones in a process of its own with an empty cache folder; return what it printed and said."""
    settings = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", RUN], env=settings, capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr


def write_and_attend():
    """Return a cache of one layer and 4 tokens for each of its 2 rows."""
    own = init_cache(1, 2, 2, 16, 40, jnp.dtype("float32"))
    queries, keys, values = (jnp.asarray(draw(2, 4, n, 16, seed=n)) for n in (4, 2, 2))
    return own, queries, keys, values, jnp.asarray([0, 20], jnp.int32)


def test_attention_of_a_cache_has_it():
    inputs = write_and_attend()
    program = jax.jit(attend_cached).lower(*inputs).compile().as_text()
    assert "AttendCached" in program
    for got, want in zip(
        jax.tree.leaves(attend_cached(*inputs)), jax.tree.leaves(write_then_attend(*inputs)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert not cpu_kernels.has_kernels_for("float32")


def test_gradients_of_attention():
    own, *inputs, start = write_and_attend()
    ours, xlas = (
        jax.grad(lambda *x, f=f: jnp.sum(f(own, *x, start)[1] ** 2), argnums=(0, 1, 2))(*inputs)
        for f in (attend_cached, write_then_attend)
    )
    for got, want in zip(ours, xlas, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_products_are_xlas_and_one_line_says_so(tmp_path):
    out, err = run_with(tmp_path, CXX="no-such-compiler")
    assert out == "False 64.0"
    assert "left to XLA" in err
    assert "no-such-compiler" in err
    assert len(err.strip().splitlines()) == 1


def test_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'unknown option of a test' >&2\nexit 1\n")
    compiler.chmod(0o755)
    out, err = run_with(tmp_path, CXX=str(compiler))
    assert out == "False 64.0"
    assert "unknown option of a test" in err


def test_switch(tmp_path):
    assert run_with(tmp_path, DOMINO_JAX_KERNELS="0") == ("False 64.0", "")
    assert not list(tmp_path.iterdir())
    _, err = run_with(tmp_path, DOMINO_JAX_KERNELS="no")
    assert "DOMINO_JAX_KERNELS is 'no'; allowed: 1" in err


@pytest.mark.parametrize(
    "command", ["train.py --config configs/tiny.py --config.output_dir=OUT", "serve.py --target T"]
)
def test_wrong_switch_is_one_sentence(tmp_path, command):
    target = TargetConfig(64, 8, 16, 1, 2, 1, 4, tie_word_embeddings=True)
    save_target(tmp_path / "target", target, init_target_params(target, jax.random.key(0)))
    save_tokenizer(train_tokenizer(["some text"], 300), tmp_path / "target")
    root = Path(__file__).resolve().parents[2]
    words = (
        command.replace("OUT", str(tmp_path / "out")).replace("--target T", f"--target {tmp_path / 'target'}").split()
    )
    settings = os.environ | {"DOMINO_JAX_KERNELS": "no", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], env=settings, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: DOMINO_JAX_KERNELS is 'no'; allowed: 1")
    assert "Traceback" not in done.stderr


def test_compiler_that_hangs_is_given_up():
    said = subprocess.TimeoutExpired(["c++"], 300, stderr=b"still reading \xff\nan error")
    assert cpu_kernels._find_reason(said) == "an error"
    assert "300 seconds" in cpu_kernels._find_reason(subprocess.TimeoutExpired(["c++"], 300))


def test_compiled_once_and_kept(tmp_path):
    assert run_with(tmp_path) == ("True 64.0", "")
    (file,) = (tmp_path / "domino_jax").iterdir()
    assert run_with(tmp_path, PATH="") == ("True 64.0", "")  # finds no compiler, needs none
    assert [file] == list((tmp_path / "domino_jax").iterdir())


def test_kept_file_that_does_not_load_is_replaced(tmp_path):
    run_with(tmp_path)
    (file,) = (tmp_path / "domino_jax").iterdir()
    file.write_bytes(b"of another system")
    assert run_with(tmp_path) == ("True 64.0", "")
    assert run_with(tmp_path, PATH="") == ("True 64.0", "")


def test_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path):
    blocked = Path(tmp_path) / "file"
    blocked.write_text("")
    assert run_with(blocked) == ("True 64.0", "")
