"""How matrices are multiplied: what `auto` is where, and what rounding does to products and to their gradients."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, Config
from smallcoder_jax.configfile import load_config
from smallcoder_jax.ops import precision
from smallcoder_jax.ops.cross_entropy import token_losses, unembedding_products
from smallcoder_jax.ops.linear import linear
from smallcoder_jax.optim import orthogonalize

NANO = str(Path(__file__).resolve().parents[2] / "configs" / "nano.py")


@pytest.mark.parametrize(
    ("flags", "dtype", "platform", "kind"),
    [
        ("fpu avx512f avx512_bf16", "float32", "cpu", "mixed"),
        ("fpu amx_tile amx_bf16", "float32", "cpu", "mixed"),
        ("fpu avx2 avx512f avx512bw", "float32", "cpu", "exact"),
        ("fpu amx_bf16", "bfloat16", "cpu", "exact"),
        ("fpu amx_bf16", "float32", "gpu", "exact"),
        ("fpu amx_bf16", "float32", "tpu", "exact"),
    ],
)
def test_auto_is_mixed_where_the_cpu_has_instructions_for_it(
    flags: str, dtype: Any, platform: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: none\n")
    choice = precision.choose(ComputeConfig(dtype=dtype, matmul="auto"), platform)
    assert choice.kind == kind
    assert {"mixed": flags.split()[-1], "exact": ""}[kind] in choice.reason
    assert precision.choose(ComputeConfig(dtype=dtype, matmul="exact"), platform).kind == "exact"


def test_auto_is_exact_where_no_processor_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "none")
    assert precision.choose(ComputeConfig(dtype="float32", matmul="auto"), "cpu").kind == "exact"


def test_mixed_products_of_bfloat16_are_refused() -> None:
    with pytest.raises(UserError, match=r"compute.matmul='mixed' is of float32 products"):
        load_config(NANO, ["--config.compute.matmul=mixed", "--config.compute.dtype=bfloat16"])
    assert isinstance(load_config(NANO, ["--config.compute.matmul=mixed"]), Config)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def rounded(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)


def test_a_mixed_product_rounds_inputs_and_nothing_else() -> None:
    a, b = draw(17, 64), draw(64, 23)
    run = jax.jit(precision.multiplying("mixed", lambda a, b: precision.product("ij,jk->ik", a, b, a.dtype)))
    found = run(a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, rounded(a) @ rounded(b), rtol=1e-5, atol=1e-5)
    exact = jax.jit(lambda a, b: precision.product("ij,jk->ik", a, b, a.dtype))(a, b)
    np.testing.assert_allclose(exact, np.asarray(a, np.float64) @ np.asarray(b, np.float64), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(found) - np.asarray(exact)).max() > 1e-3


@pytest.mark.parametrize(
    ("subscripts", "a", "b"),
    [
        ("xv,xd->vd", (63, 96), (63, 31)),
        ("bkxs,bkxh->bskh", (2, 3, 17, 24), (2, 3, 17, 16)),
        ("bti,bto->io", (2, 17, 24), (2, 17, 16)),
        ("...ij,...kj->...ik", (3, 16, 24), (3, 16, 24)),
    ],
)
def test_mixed_products_over_any_axis(subscripts: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Those over a first axis are written another way. Each use of a result is a program of its own, because the
    compiler turns a product whose only use is its transpose into another product."""
    one, other = draw(*a), draw(*b)
    wanted = np.einsum(subscripts, rounded(one), rounded(other))

    def multiply(one: jax.Array, other: jax.Array) -> jax.Array:
        return precision.product(subscripts, one, other, jnp.float32)

    def transposed(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.swapaxes(multiply(one, other), -1, -2)

    found = jax.jit(precision.multiplying("mixed", multiply))(one, other)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    found = jax.jit(precision.multiplying("mixed", transposed))(one, other)
    np.testing.assert_allclose(found, np.swapaxes(wanted, -1, -2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_the_unembedding_s_gradient_in_the_layout_of_its_parameter(embeddings: str) -> None:
    """An untied unembedding, and a byte-level model's head, are transposed before they are multiplied."""
    hidden, unembed, gradient = draw(96, 32), draw(64, 32), draw(96, 64)

    def gradients(d_logits: jax.Array, hidden: jax.Array, parameter: jax.Array) -> jax.Array:
        unembed = parameter if embeddings == "tied" else parameter.T
        found = unembedding_products(d_logits, hidden, unembed, jnp.float32)[1]
        return found if embeddings == "tied" else found.T

    parameter = unembed if embeddings == "tied" else unembed.T
    found = jax.jit(precision.multiplying("mixed", gradients))(gradient, hidden, parameter)
    wanted = rounded(gradient).T @ rounded(hidden)
    np.testing.assert_allclose(found, wanted if embeddings == "tied" else wanted.T, rtol=1e-5, atol=1e-5)


def test_a_mixed_layer_keeps_its_input_rounded() -> None:
    """At half the size, and with the gradients of the exact one but for the rounding."""
    x, kernel = draw(2, 17, 24), draw(24, 16)

    def residuals(kind: precision.Kind) -> tuple[list[str], jax.Array, jax.Array]:
        y, backward = jax.vjp(precision.multiplying(kind, linear), x, kernel)
        gradients = precision.multiplying(kind, backward)(jnp.ones_like(y))
        return sorted(str(leaf.dtype) for leaf in jax.tree.leaves(backward)), *gradients

    kept, dx, dkernel = residuals("mixed")
    assert kept == ["bfloat16", "float32"]
    assert dx.dtype == dkernel.dtype == jnp.float32
    exact_kept, exact_dx, exact_dkernel = residuals("exact")
    assert exact_kept == ["float32", "float32"]
    np.testing.assert_allclose(dx, exact_dx, atol=0.1)
    np.testing.assert_allclose(dkernel, exact_dkernel, atol=0.1)


def test_a_function_that_was_traced_for_one_kind_is_traced_again_for_the_other() -> None:
    """Also where jax is told another default from outside."""
    a, b = draw(17, 64), draw(64, 23)

    def looped(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: precision.product("j,jk->k", row, b, row.dtype), a)

    def of(kind: precision.Kind) -> np.ndarray:
        return np.asarray(jax.jit(precision.multiplying(kind, looped))(a, b))

    exact, mixed = of("exact"), of("mixed")
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_array_equal(of("exact"), exact)
    np.testing.assert_array_equal(of("exact"), exact)
    np.testing.assert_array_equal(of("mixed"), mixed)
    assert np.abs(exact - mixed).max() > 1e-3


def test_gradients_are_made_by_the_same_products_as_what_they_are_of() -> None:
    """The backward pass is traced after the function has returned."""
    x, kernel, dy = draw(2, 9, 16), draw(16, 12), draw(2, 9, 12)

    def gradients(x: jax.Array, kernel: jax.Array) -> Any:
        return jax.vjp(linear, x, kernel)[1](dy)

    dx, d_kernel = jax.jit(precision.multiplying("mixed", gradients))(x, kernel)
    np.testing.assert_allclose(dx, rounded(dy) @ rounded(kernel).T, rtol=1e-5, atol=1e-5)
    want = np.einsum("bti,bto->io", rounded(x), rounded(dy))
    np.testing.assert_allclose(d_kernel, want, rtol=1e-5, atol=1e-5)


def test_every_product_of_a_step_is_mixed() -> None:
    """Dense layers, cross-entropy and Muon: of the program's products none has float32 inputs."""
    hidden, unembed, targets = draw(6, 8), draw(32, 8), jnp.arange(6, dtype=jnp.int32)

    def step(hidden: jax.Array, unembed: jax.Array) -> Any:
        def loss(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
            return jnp.sum(token_losses(linear(hidden[None], draw(8, 8))[0], unembed, targets).nll_X)

        return jax.tree.map(orthogonalize, jax.grad(loss, (0, 1))(hidden, unembed))

    for kind, inputs in (("mixed", "bf16"), ("exact", "f32")):
        text = jax.jit(precision.multiplying(kind, step)).lower(hidden, unembed).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) > 15
        assert all(line.split(" : ")[-1].startswith("(tensor<") and f"x{inputs}>, tensor" in line for line in products)
