"""The XLA reference against attention written out in numpy, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.ops.attention import attention, choose
from smallcoder_jax.ops.rope import rotate
from tests.helpers import CAPTURES

pytestmark = CAPTURES


def written_out(q, k, v, positions, segments, theta, window):
    batch, length, heads, size = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)

    def turn(x, position):
        if theta is None:
            return x
        half = size // 2
        angle = position * theta ** (-np.arange(half) / half)
        first, second = x[:half], x[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    for b in range(batch):
        for t in range(length):
            seen = [
                s
                for s in range(length)
                if segments[b, s] == segments[b, t] > 0
                and 0 <= positions[b, t] - positions[b, s] < (window or length + 1)
            ]
            for n in range(heads):
                if not seen:
                    continue
                query = turn(q[b, t, n], positions[b, t])
                scores = np.array([query @ turn(k[b, s, n // group], positions[b, s]) for s in seen]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, n] = sum(w * v[b, s, n // group] for w, s in zip(weights, seen, strict=True))
    return out


def inputs(length, heads, kv_heads, size, seed=0):
    generator = np.random.default_rng(seed)
    q, k, v = (generator.normal(size=(2, length, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[1, -3:] = 0  # padding
    positions = np.zeros((2, length), np.int32)
    for b in range(2):
        for segment in np.unique(segments[b]):
            where = segments[b] == segment
            positions[b, where] = np.arange(where.sum())
    return q, k, v, positions, segments


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("theta", [None, 10_000.0, 123.0])
@pytest.mark.parametrize("window", [None, 5])
def test_reference_equals_attention_written_out(heads, kv_heads, theta, window):
    q, k, v, positions, segments = inputs(24, heads, kv_heads, 8)
    places, ids = jnp.asarray(positions), jnp.asarray(segments)
    o = attention(
        *map(jnp.asarray, (q, k, v)), q_positions_BT=places, kv_positions_BS=places, q_segment_ids_BT=ids,
        kv_segment_ids_BS=ids, rope_theta=theta, window=window,
    )  # fmt: skip
    np.testing.assert_allclose(o, written_out(q, k, v, positions, segments, theta, window), atol=2e-6)


def dense(q, k, v, positions, segments, theta, window):
    """All scores at once, plainly enough for jax to derive the gradients."""
    if theta is not None:
        q, k = rotate(q, positions, theta), rotate(k, positions, theta)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0) & (distance >= 0)
    seen &= distance < (window or distance.shape[1])
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, :, :], scores, -1e30), axis=-1)
    o = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return jnp.where(seen.any(-1)[:, :, None, None], o, 0.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("length", "window"), [(24, None), (24, 5), (1100, None), (1100, 70)])
def test_gradients_equal_those_that_jax_derives(heads, kv_heads, length, window):
    q, k, v, positions, segments = (jnp.asarray(x) for x in inputs(length, heads, kv_heads, 16, seed=2))
    do = jax.random.normal(jax.random.key(3), q.shape)

    def ours(q, k, v):
        return attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segment_ids_BT=segments,
            kv_segment_ids_BS=segments, rope_theta=1e4, window=window,
        )  # fmt: skip

    got = jax.jit(lambda *qkv: jax.vjp(ours, *qkv)[1](do))(q, k, v)
    want = jax.jit(lambda *qkv: jax.vjp(lambda *x: dense(*x, positions, segments, 1e4, window), *qkv)[1](do))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("length", [300, 2300])  # blocks one after the other; blocks in a loop
def test_blocks_do_not_change_values_or_gradients(length, monkeypatch):
    q, k, v, positions, segments = (jnp.asarray(x) for x in inputs(length, 4, 2, 16, seed=1))

    def total(q, k, v):
        o = attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segment_ids_BT=segments,
            kv_segment_ids_BS=segments, rope_theta=1e4,
        )  # fmt: skip
        return jnp.sum(jnp.sin(o))

    blocked = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    monkeypatch.setattr("smallcoder_jax.ops.attention_xla.LOOP_BEYOND", length)
    monkeypatch.setattr("smallcoder_jax.ops.attention_xla.QUERY_BLOCK", length)
    whole = jax.jit(jax.value_and_grad(lambda *qkv: total(*qkv), (0, 1, 2)))(q, k, v)
    for a, b in zip(jax.tree.leaves(blocked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_padding_is_zero_and_never_nan():
    q, k, v, positions, segments = (jnp.asarray(x) for x in inputs(24, 4, 2, 8))
    nothing = jnp.zeros_like(segments)
    o = attention(
        q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segment_ids_BT=nothing,
        kv_segment_ids_BS=nothing, rope_theta=1e4,
    )  # fmt: skip
    assert (o == 0).all()


def test_rotation_depends_on_relative_position_only():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 32))
    y = jax.random.normal(jax.random.key(1), (1, 1, 1, 32))

    def score(i, j):
        return jnp.sum(rotate(x, jnp.array([[i]]), 1e4) * rotate(y, jnp.array([[j]]), 1e4))

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-3


SHAPE = {"length": 2048, "keys": 2048, "group": 3, "size": 128, "dtype": "bfloat16"}


def test_auto_is_chosen_by_platform_and_shape():
    assert choose("auto", **SHAPE).implementation == "xla"
    assert choose("auto", **SHAPE, platform="tpu").implementation == "pallas_tpu"
    decoding = choose("auto", **{**SHAPE, "length": 1}, platform="tpu")
    assert decoding.implementation == "xla"
    assert "1 queries over 2048 keys" in decoding.reason
    assert choose("auto", **SHAPE, platform="tpu", context=2).implementation == "pallas_tpu"
    split = choose("auto", **SHAPE, platform="gpu", device="NVIDIA H200", context=2)
    assert split.implementation == "xla"
    assert "mesh.context=2 splits" in split.reason
    endless = choose("auto", **{**SHAPE, "length": 10**6, "keys": 10**6}, platform="tpu")
    assert endless.implementation == "xla"
    assert "VMEM" in endless.reason
    assert choose("auto", **SHAPE, platform="gpu", device="NVIDIA H200").implementation == "pallas_gpu"
    older = choose("auto", **SHAPE, platform="gpu", device="NVIDIA A100-SXM4-80GB")
    assert older.implementation == "xla"
    assert "made for NVIDIA Hopper" in older.reason
    exact = choose("auto", **{**SHAPE, "dtype": "float32"}, platform="gpu", device="NVIDIA H200")
    assert exact.implementation == "xla"
    assert "bfloat16, not float32" in exact.reason


def test_cudnn_serves_rows_of_one_document_alone():
    assert choose("cudnn", **SHAPE, platform="gpu", packed=False).implementation == "cudnn"
    assert choose("auto", **SHAPE, platform="gpu", device="NVIDIA H200", packed=False).implementation == "pallas_gpu"


@pytest.mark.parametrize(
    ("implementation", "changes", "words"),
    [
        ("flash", {}, "known: auto, xla, cudnn, pallas_tpu, pallas_gpu"),
        ("pallas_tpu", {"platform": "cpu"}, "runs on TPUs; the platform is 'cpu'"),
        ("pallas_tpu", {"keys": 4096}, "2048 queries over 4096 keys"),
        ("pallas_gpu", {"context": 4}, r"whole rows, which mesh\.context=4 splits; use auto or xla"),
        ("pallas_tpu", {"length": 10**6, "keys": 10**6}, "MiB of VMEM"),
        ("pallas_gpu", {"platform": "tpu"}, "runs on GPUs; the platform is 'tpu'"),
        ("pallas_gpu", {"device": "NVIDIA GeForce RTX 4090"}, "not for NVIDIA GeForce RTX 4090"),
        ("pallas_gpu", {"size": 256}, "head sizes up to 128, not 256"),
        ("pallas_gpu", {"keys": 4096}, "2048 queries over 4096 keys"),
        ("cudnn", {}, "rows are packed"),
        ("cudnn", {"packed": False, "dtype": "float32"}, "16 bits, not float32"),
        ("cudnn", {"packed": False, "size": 100}, "that 8 divides, not 100"),
    ],
)
def test_what_cannot_be_served_is_an_error_that_says_why(implementation, changes, words):
    with pytest.raises(UserError, match=words):
        choose(implementation, **{**SHAPE, **changes})
