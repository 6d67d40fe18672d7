"""The hand-written cross-entropy against jax.nn, whole and in chunks; what the chunks need in memory and on a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from smallcoder_jax import losses
from smallcoder_jax.config import MeshConfig
from smallcoder_jax.mesh import batch_sharding, flat_tokens, make_mesh, on_mesh, replicated, spec_of
from smallcoder_jax.models.decoder.sharding import RULES
from smallcoder_jax.ops import cross_entropy
from smallcoder_jax.ops.cross_entropy import choose, chunked_losses, token_losses, whole_losses
from tests.helpers import CAPTURES, tiny_model

pytestmark = CAPTURES


def case(dtype, seed=0, tokens=33, width=16, vocabulary=50):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (tokens, width)).astype(dtype)
    unembed = jax.random.normal(keys[1], (vocabulary, width))
    return hidden, unembed, jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def plain(hidden, unembed, targets):
    logits = (hidden.astype(jnp.float32) @ unembed.T).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0], logits


def in_chunks_of(chunk):
    return lambda hidden, unembed, targets: chunked_losses(hidden, unembed, targets, chunk)


def gradients(function, nll=1.0, z=0.1, rank=False):
    """(hidden, unembed, targets) -> what a training step takes from `function`: a loss, the correct, both gradients."""

    def loss(hidden, unembed, targets):
        weights = np.linspace(0.0, 2.0, targets.size, dtype=np.float32).reshape(targets.shape)
        if targets.ndim == 2:
            hidden, targets, weights = flat_tokens(hidden), flat_tokens(targets), flat_tokens(weights)
        got = function(hidden, unembed, targets)
        sums = jnp.sum(got.best_X), jnp.sum(got.rank_X < 5) if rank else None
        return jnp.sum(weights * (nll * got.nll_X + z * jnp.square(got.log_z_X))), sums

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def assert_close(got, want, tolerance):
    """Relative to the largest entry of each array; never NaN."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = (np.asarray(jax.device_get(x), np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), equal_nan=False)


@pytest.mark.parametrize("function", [whole_losses, in_chunks_of(8)], ids=["whole", "chunks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 5e-2)])
def test_values_and_gradients(function, dtype, tolerance):
    hidden, unembed, targets = case(dtype)
    weights = jnp.linspace(0.0, 2.0, 33)

    def ours(hidden, unembed):
        got = function(hidden, unembed, targets)
        return jnp.sum(weights * got.nll_X + 0.1 * jnp.square(got.log_z_X))

    def reference(hidden, unembed):
        nll, logits = plain(hidden, unembed, targets)
        return jnp.sum(weights * nll + 0.1 * jnp.square(jax.nn.logsumexp(logits, axis=-1)))

    got, want = (jax.value_and_grad(f, (0, 1))(hidden, unembed) for f in (ours, reference))
    assert_close(got, want, tolerance)
    assert got[1][0].dtype == dtype
    assert got[1][1].dtype == jnp.float32


@pytest.mark.parametrize("function", [whole_losses, in_chunks_of(8)], ids=["whole", "chunks"])
def test_rank_counts_better_entries(function):
    hidden, unembed, targets = case(jnp.float32)
    order = np.argsort(-np.asarray(plain(hidden, unembed, targets)[1]), axis=1)
    targets = targets.at[0].set(int(order[0, 0]))
    want = [int(np.flatnonzero(order[i] == int(targets[i]))[0]) for i in range(33)]
    assert want[0] == 0
    assert max(want) > 0
    found = function(hidden, unembed, targets)
    assert found.rank_X.tolist() == want
    assert found.best_X.tolist() == [rank == 0 for rank in want]


@pytest.mark.parametrize("function", [whole_losses, in_chunks_of(16)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_never_right(function, bad):
    hidden, unembed, targets = case(jnp.float32)
    found = jax.jit(function)(hidden.at[3].set(bad), unembed.at[:, 0].set(bad), targets)
    assert not np.isfinite(found.nll_X[3])
    assert not found.best_X[3]
    assert found.rank_X[3] == unembed.shape[0]


def test_bfloat16_logits_are_not_kept_in_float32():
    hidden, unembed, targets = case(jnp.bfloat16)
    _, pull = jax.vjp(lambda h: token_losses(h, unembed, targets).nll_X, hidden)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) == (33, 50)]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


# In bfloat16, a compiler may leave out the rounding of logits where it fuses them into their sums.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk", [1, 8, 11, 33, 64])  # of 33 tokens: two that leave a rest, and one that is too long
@pytest.mark.parametrize(("nll", "z"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.1)])
def test_chunks_change_nothing(dtype, tolerance, chunk, nll, z):
    operands = case(dtype, seed=1)
    for a, b in zip(chunked_losses(*operands, chunk), whole_losses(*operands), strict=True):
        assert_close(a, b, tolerance)
    got, want = (jax.jit(gradients(function, nll, z))(*operands) for function in (in_chunks_of(chunk), whole_losses))
    assert_close(got, want, tolerance)


def test_the_sum_over_chunks_is_float32():
    """A CPU keeps more digits than it is told to: this looks at what it is told."""
    text = jax.jit(gradients(in_chunks_of(8))).lower(*case(jnp.bfloat16)).as_text()
    sums = re.findall(r"stablehlo\.(add|dot_general) .*tensor<50x16x(\w+)>$", text, re.MULTILINE)
    assert set(sums) == {("add", "f32"), ("dot_general", "f32")}


MEDIUM_LC = {"tokens": 8 * 8192, "vocabulary": 49152, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("shape", "axes", "chunk"),
    [
        ({"tokens": 4 * 512, "vocabulary": 4096, "dtype": "float32"}, {}, None),
        (MEDIUM_LC, {}, 4096),
        (MEDIUM_LC, {"data": 1, "fsdp": 1, "tensor": 1}, 4096),
        (MEDIUM_LC, {"data": 2, "fsdp": 1, "tensor": 1}, None),
        (MEDIUM_LC, {"data": 1, "fsdp": 2, "tensor": 1}, None),
        (MEDIUM_LC, {"data": 1, "fsdp": 1, "context": 2, "tensor": 1}, None),
        (MEDIUM_LC, {"data": 1, "fsdp": 1, "tensor": 2}, None),
        ({**MEDIUM_LC, "tokens": 32 * 8192}, {"data": 1, "fsdp": 1, "tensor": 2}, 8192),
        ({**MEDIUM_LC, "dtype": "float32"}, {}, 2048),
        ({**MEDIUM_LC, "vocabulary": 32768}, {}, None),  # just the limit
        ({**MEDIUM_LC, "vocabulary": 32768, "tokens": 8 * 8192 + 1}, {}, 8192),
    ],
)
def test_chunks_are_chosen_by_the_memory_of_a_devices_logits(shape, axes, chunk):
    assert choose(**shape, axes=axes).chunk == chunk


def test_the_choice_says_why():
    assert choose(**MEDIUM_LC, axes={}).reason == "6.00 GiB of logits per device, limit 4.00"
    assert choose(**MEDIUM_LC, axes={"data": 8}).reason == "0.75 GiB of logits per device, limit 4.00"


def compiled(function, *operands):
    return jax.jit(function).lower(*operands).compile()


def loops(compiled):
    return len(re.findall(r" while\(", compiled.as_text()))


def test_token_losses_follow_the_choice(monkeypatch):
    operands = case(jnp.float32, seed=2)
    assert loops(compiled(gradients(token_losses), *operands)) == 0
    want = gradients(token_losses)(*operands)
    monkeypatch.setattr(cross_entropy, "WHOLE_BYTES", 33 * 50 * 4 - 1)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 9 * 50 * 4)
    assert choose(33, 50, "float32", {}).chunk == 8
    assert loops(compiled(gradients(lambda *x: token_losses(*x)), *operands)) == 2
    assert_close(gradients(lambda *x: token_losses(*x))(*operands), want, 1e-6)


# What is compiled here is never run: Medium-LC's largest step, and a shape at which compilers do the same.
def shapes(dtype, rows=8, length=2048, width=128, vocabulary=8192):
    return (
        jax.ShapeDtypeStruct((rows, length, width), dtype),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_keep_no_logits(dtype):
    token = 8192 * jnp.dtype(dtype).itemsize
    whole = compiled(gradients(whole_losses), *shapes(dtype, length=1024))
    short, long = (compiled(gradients(in_chunks_of(512)), *shapes(dtype, length=t)) for t in (1024, 4096))
    assert temporary_bytes(whole) >= 8 * 1024 * token
    assert temporary_bytes(long) < 8 * 4096 * token / 8
    assert temporary_bytes(long) - temporary_bytes(short) < 8 * (4096 - 1024) * token / 16


def test_medium_lc_with_a_large_vocabulary_fits():
    """8 rows of 8192 tokens, bfloat16: 6 GiB of logits alone."""
    operands = shapes(jnp.bfloat16, length=8192, width=1024, vocabulary=49152)
    assert temporary_bytes(compiled(gradients(whole_losses), *operands)) > 6 * 2**30
    assert temporary_bytes(compiled(gradients(token_losses), *operands)) < 2 * 2**30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("function", [whole_losses, in_chunks_of(512)], ids=["whole", "chunks"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_training_does_not_pay_for_ranks(function, dtype, accumulated, monkeypatch):
    def cost(rank):
        step, operands = gradients(lambda *x: function(*x), rank=rank), shapes(dtype)
        if accumulated:  # in the loop over microbatches
            single, hidden = step, operands[0]
            operands = (jax.ShapeDtypeStruct((2, *hidden.shape), hidden.dtype), *operands[1:])

            def step(hidden, unembed, targets):
                return jax.lax.map(lambda part: single(part, unembed, targets), hidden)

        result = compiled(step, *operands)
        analysis = result.cost_analysis()
        assert analysis is not None
        return analysis["flops"], temporary_bytes(result)

    training, evaluating = cost(False), cost(True)
    original = cross_entropy._losses
    monkeypatch.setattr(cross_entropy, "_losses", lambda *x: original(*x)._replace(rank_X=jnp.zeros_like(x[1])))
    assert training == cost(False)
    logits = (8 * 2048 if function is whole_losses else 512) * 8192  # XLA counts a loop's body once
    assert evaluating[0] - training[0] > logits


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=1, fsdp=2, context=4),
}
ROWS, LENGTH, WIDTH, VOCABULARY, CHUNK = 8, 512, 16, 64, 48


def on_the_mesh(mesh_config, function, operands):
    """The compiled gradients of `function`, with operands and results split as in training; and placed operands."""
    model = tiny_model(vocab_size=operands[1].shape[0], width=operands[1].shape[1], heads=8, kv_heads=8)
    mesh = make_mesh(mesh_config, model, operands[0].shape[0])
    rows, table = batch_sharding(mesh), NamedSharding(mesh, spec_of(RULES, "embed/embedding", 2))
    step = jax.jit(
        on_mesh(mesh, gradients(function)),
        in_shardings=(rows, table, rows),
        out_shardings=(replicated(mesh), (rows, table)),
    )
    return step.lower(*operands).compile(), (rows, table, rows)


def collectives(compiled):
    """Of each collective: whether it runs in a loop, and the elements of its largest array."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= (.*?) (?:all-|reduce-scatter|collective-)[a-z-]*\(", line)
        if match:
            arrays = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append(("while/body" in line, max(math.prod(map(int, filter(None, a.split(",")))) for a in arrays)))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", list(MESHES))
def test_on_a_mesh_each_device_loops_over_its_own_tokens(name, dtype, tolerance):
    mesh = MESHES[name]
    hidden, unembed, targets = case(dtype, 3, ROWS * LENGTH, WIDTH, VOCABULARY)
    operands = (hidden.reshape(ROWS, LENGTH, WIDTH), unembed, targets.reshape(ROWS, LENGTH))
    program, shardings = on_the_mesh(mesh, in_chunks_of(CHUNK), operands)
    got = program(*(jax.device_put(x, sharding) for x, sharding in zip(operands, shardings, strict=True)))
    assert_close(got, jax.jit(gradients(whole_losses))(*operands), tolerance)
    # Exchanged are the unembedding and its gradient, once, and where the vocabulary is split a chunk's sums over it and
    # its hidden states' gradient. Logits and other devices' tokens, which are larger, are not.
    assert min(CHUNK * VOCABULARY, LENGTH * WIDTH) > VOCABULARY * WIDTH
    exchanged = collectives(program)
    once, in_loops = ([size for inside, size in exchanged if inside == where] for where in (False, True))
    assert max(once, default=0) == (VOCABULARY * WIDTH // mesh.tensor if name != "tensor" else 0)
    assert max(in_loops, default=0) == (CHUNK * WIDTH if mesh.tensor > 1 else 0)


@pytest.mark.parametrize("name", list(MESHES))
def test_on_a_mesh_chunks_keep_no_logits(name):
    whole, chunks = (
        temporary_bytes(on_the_mesh(MESHES[name], function, shapes(jnp.float32))[0])
        for function in (whole_losses, in_chunks_of(512))
    )
    logits = 8 * 2048 * 8192 * 4 // 8
    assert whole >= logits
    assert chunks < logits / 2


def test_on_a_mesh_the_choice_is_that_of_one_device(monkeypatch):
    monkeypatch.setattr(cross_entropy, "WHOLE_BYTES", 8 * 2048 * 8192 * 4 // 8)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 512 * 8192 * 4)
    operands = shapes(jnp.float32)
    assert loops(on_the_mesh(MESHES["all"], lambda *x: token_losses(*x), operands)[0]) == 0
    assert loops(compiled(gradients(lambda *x: token_losses(*x)), *operands)) == 2


def test_language_model_loss_is_a_weighted_sum():
    hidden, unembed, targets = case(jnp.float32)
    weights = jnp.where(jnp.arange(33) < 20, 1.0, 0.0)
    loss, weight, sums = losses.language_model(hidden, unembed, targets, weights, 0.0)
    nll, logits = plain(hidden, unembed, targets)
    np.testing.assert_allclose(loss, nll[:20].sum(), rtol=1e-5)
    assert float(weight) == 20
    assert float(sums["nats"]) == float(loss)
    assert float(sums["accuracy"]) == float((logits.argmax(-1) == targets)[:20].sum())
    assert float(sums["accuracy"]) <= float(sums["top5_accuracy"]) <= 20
    with_z = losses.language_model(hidden, unembed, targets, weights, 0.5)[0]
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))[:20].sum()
    np.testing.assert_allclose(with_z - loss, 0.5 * z, rtol=1e-4)
