"""The byte-level family: counts, what a position may depend on, caches, splitting; flat and in stages."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallcoder_jax
from configs import bytes as byte_level
from smallcoder_jax import optim, run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import (
    ComputeConfig,
    Config,
    HnetConfig,
    MeshConfig,
    OptimizerConfig,
    default_config,
    from_config_dict,
)
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.models.hnet.model import init_state
from smallcoder_jax.ops import precision
from smallcoder_jax.ops.cross_entropy import token_losses
from tests.helpers import FLOAT32, max_difference, packed_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")

FLAT = HnetConfig(width=32, blocks=2, context=64, conv_size=3, conv="separate")
# Every setting that a model with a stage of chunks can have.
MIXED = HnetConfig(
    width=32,
    inner_widths=(48,),
    encoder_blocks=(1,),
    decoder_blocks=(1,),
    blocks=3,
    ternary=(False, True),
    expand_ratio=2,
    conv_size=2,
    pattern="xa",
    kv_heads=2,
    window=4,
    context=64,
    chunk_target=3.0,
)
STAGED = HnetConfig(
    width=32,
    inner_widths=(48, 64),
    encoder_blocks=(1, 2),
    decoder_blocks=(1, 1),
    blocks=2,
    context=64,
    chunk_target=3.0,
)
SHAPES = {"flat": FLAT, "mixed": MIXED, "staged": STAGED}
TRAINED = dataclasses.replace(STAGED, inner_widths=(48,), encoder_blocks=(1,), decoder_blocks=(1,), blocks=1)
INPUTS = ("tokens", "positions", "segment_ids")


def made(model: HnetConfig, compute: ComputeConfig = FLOAT32, seed: int = 0) -> Any:
    """Parameters in which the routers and the paths around the inner stages are not those of an untrained model."""
    unrolled = build.init_params(model, FLOAT32, jax.random.key(seed))

    def moved(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "router" in name or "residual" in name or "wider" in name:
            drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=leaf.shape)
            return leaf + (0.2 * drawn).astype(np.float32)
        return leaf

    return build.to_layout(jax.tree_util.tree_map_with_path(moved, unrolled), compute)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: HnetConfig, params: Any, *inputs: Any) -> Any:
    return build.bind(build.abstract_model(model, FLOAT32)[0], params)(*inputs)


@functools.partial(jax.jit, static_argnums=0)
def extend(model: HnetConfig, params: Any, *inputs: Any) -> Any:
    return build.bind(build.abstract_model(model, FLOAT32)[0], params).extend(*inputs)


@pytest.mark.parametrize(
    ("variant", "count"),
    [("byte_flat", 20_744_192), ("byte_1stage", 21_356_032), ("byte_2stage", 189_669_120), ("byte_75m", 75_068_544)],
)
def test_the_published_shapes_have_their_counts(variant: str, count: int) -> None:
    assert from_config_dict(byte_level.get_config(variant)).model.parameter_count() == count


@pytest.mark.parametrize(
    "model", [*SHAPES.values(), dataclasses.replace(MIXED, ternary=(True, False), conv="separate")]
)
def test_parameters_are_counted(model: HnetConfig) -> None:
    _, shapes = build.abstract_model(model, FLOAT32)
    assert model.parameter_count() == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_heads_without_attention_are_accepted_and_said_to_do_nothing() -> None:
    assert "heads 8 (no effect: no attention)" in dataclasses.replace(FLAT, heads=8).summary()
    assert "no effect" not in FLAT.summary() + dataclasses.replace(MIXED, heads=8).summary()


def batch_of(model: HnetConfig, rows: int = 2, length: int = 32, seed: int = 0) -> dict[str, Any]:
    return {name: jnp.asarray(array) for name, array in packed_batch(model, rows, length, seed).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_a_document_does_not_depend_on_what_it_is_packed_with(name: str) -> None:
    model, params = SHAPES[name], made(SHAPES[name])
    batch = batch_of(model)
    packed = np.asarray(forward(model, params, *(batch[key] for key in INPUTS)).states_BTD)
    segments = np.asarray(batch["segment_ids"])
    for row in range(2):
        for segment in range(1, segments[row].max() + 1):
            places = np.flatnonzero(segments[row] == segment)
            alone = {key: np.zeros((2, 32), np.int32) for key in INPUTS}
            for key in INPUTS:
                alone[key][0, : len(places)] = np.asarray(batch[key])[row, places]
            found = forward(model, params, *(jnp.asarray(alone[key]) for key in INPUTS)).states_BTD
            np.testing.assert_allclose(found[0, : len(places)], packed[row, places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_a_position_depends_on_nothing_behind_it_nor_on_other_documents(name: str) -> None:
    """By the gradient of its hidden state by every embedded byte: through routing and chunking too."""
    model = SHAPES[name]
    graph, _ = build.abstract_model(model, FLOAT32)
    params = made(model)
    batch = batch_of(model, rows=1)
    # A byte of its own at each position, so that the table's gradient is the positions'.
    tokens = jnp.arange(32, dtype=jnp.int32)[None]
    direction = jax.random.normal(jax.random.key(5), (model.width,))

    def state_at(params: Any, table: Any, place: Any) -> Any:
        bound = build.bind(graph, {**params, "embed": {"embedding": table}})
        states = bound(tokens, batch["positions"], batch["segment_ids"]).states_BTD
        return states[0, place] @ direction

    gradient = jax.jit(jax.grad(state_at, argnums=1))
    segments = np.asarray(batch["segment_ids"])[0]
    for place in (5, 14, 23):
        assert segments[place] > 0
        reached = np.abs(np.asarray(gradient(params, params["embed"]["embedding"], place))[:32]).sum(axis=1)
        allowed = (segments == segments[place]) & (np.arange(32) <= place)
        assert reached[place] > 0
        assert not reached[~allowed].any()
        assert (reached[allowed] > 0).sum() > 1


@pytest.mark.parametrize("name", SHAPES)
def test_step_by_step_gives_the_states_of_the_whole_row(name: str) -> None:
    model = SHAPES[name]
    params, batch = made(model), batch_of(model, seed=3)
    whole = forward(model, params, *(batch[key] for key in INPUTS)).states_BTD
    cache, parts, at = init_state(model, 2, 64, "float32"), [], 0
    for size in (6, *[1] * 6, 6, *[1] * 14):
        part, cache = extend(model, params, *(batch[key][:, at : at + size] for key in INPUTS), cache)
        parts.append(part)
        at += size
    assert at == 32
    seen = np.asarray(batch["segment_ids"]) > 0
    found = np.asarray(jnp.concatenate(parts, axis=1))
    np.testing.assert_allclose(found[seen], np.asarray(whole)[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_quantized_once_for_generation_it_computes_the_same(name: str) -> None:
    model, batch = SHAPES[name], batch_of(SHAPES[name])
    params = made(model)
    prepared = family_of(model).for_generation(params, FLOAT32)
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(prepared) if "mlp" in str(path)]
    assert any(set(np.unique(leaf)) == {-1.0, 0.0, 1.0} for leaf in kernels)
    cache = init_state(model, 2, 64, "float32")
    inputs = [batch[key][:, :6] for key in INPUTS]
    np.testing.assert_allclose(extend(model, prepared, *inputs, cache)[0], extend(model, params, *inputs, cache)[0])
    graph = build.abstract_model(model, FLOAT32)[0]
    found, wanted = (build.bind(graph, tree).unembedding() for tree in (prepared, params))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_padding_on_the_left_leaves_no_trace_in_a_cache() -> None:
    params = made(STAGED)
    tokens, ones = jnp.arange(40, 52, dtype=jnp.int32).reshape(2, 6), jnp.ones((2, 6), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    plain, cache = extend(STAGED, params, tokens, places, ones, init_state(STAGED, 2, 64, "float32"))
    left = [jnp.pad(array, [(0, 0), (5, 0)]) for array in (tokens, places, ones)]
    padded, same = extend(STAGED, params, *left, init_state(STAGED, 2, 64, "float32"))
    np.testing.assert_allclose(padded[:, 5:], plain, rtol=1e-4, atol=1e-4)
    assert max_difference(cache, same) < 1e-4
    ended, after = extend(STAGED, params, tokens[:, :1], places[:, :1], jnp.zeros((2, 1), jnp.int32), cache)
    assert max_difference(cache, after) == 0.0
    assert ended.shape == (2, 1, 32)


@pytest.mark.parametrize(
    "name", ["flat", pytest.param("mixed", marks=pytest.mark.slow), pytest.param("staged", marks=pytest.mark.slow)]
)
def test_both_layouts_and_rematerialisation_compute_the_same(name: str) -> None:
    model = SHAPES[name]
    batch = batch_of(model)

    def loss(params: Any, compute: ComputeConfig) -> Any:
        hidden = build.bind(build.abstract_model(model, compute)[0], params)(*(batch[key] for key in INPUTS))
        return jnp.mean(hidden.states_BTD**2) + hidden.losses["ratio"][0]

    values, gradients = {}, {}
    for layers, remat in (("unroll", "none"), ("scan", "none"), ("scan", "full")):
        compute = dataclasses.replace(FLOAT32, layers=layers, remat=remat)
        params = made(model, compute)
        of_compute = jax.jit(jax.value_and_grad(lambda params, compute=compute: loss(params, compute)))
        values[layers, remat], gradient = of_compute(params)
        gradients[layers, remat] = build.to_unrolled(gradient)
    first = values["unroll", "none"]
    assert all(float(value) == pytest.approx(float(first), rel=1e-4) for value in values.values())
    for gradient in gradients.values():
        assert max_difference(gradient, gradients["unroll", "none"]) < 2e-3


@pytest.mark.parametrize("name", ["flat", pytest.param("mixed", marks=pytest.mark.slow)])
def test_mixed_products_round_and_change_nothing_else(name: str) -> None:
    """The whole numbers of a ternary layer are exact in bfloat16; the head's, attention's and gradients are rounded."""
    model, params = SHAPES[name], made(SHAPES[name])
    batch = batch_of(model)

    def loss(params: Any) -> Any:
        module = build.bind(build.abstract_model(model, FLOAT32)[0], params)
        states_BTD = module(*(batch[key] for key in INPUTS)).states_BTD
        return jnp.mean(
            token_losses(flat_tokens(states_BTD), module.unembedding(), flat_tokens(batch["targets"])).nll_X
        )

    def of(kind: precision.Kind) -> Any:
        return jax.jit(precision.multiplying(kind, jax.value_and_grad(loss)))(params)

    (exact, exact_gradient), (mixed, gradient) = of("exact"), of("mixed")
    assert float(mixed) == pytest.approx(float(exact), abs=1e-3 if name == "flat" else 1e-2)
    assert 0.0 < max_difference(gradient, exact_gradient) < 5e-2


def test_the_ratio_loss_is_one_for_each_stage_within() -> None:
    total, weight = forward(STAGED, made(STAGED), *(batch_of(STAGED)[key] for key in INPUTS)).losses["ratio"]
    assert 0.5 < float(total / weight) / STAGED.ratio_weight < 4.0
    assert float(forward(FLAT, made(FLAT), *(batch_of(FLAT)[key] for key in INPUTS)).losses["ratio"][0]) == 0.0


def test_stages_learn_at_their_own_rates() -> None:
    model = dataclasses.replace(STAGED, stage_rates=(2.0, 1.5, 1.0))
    params = {"model": build.init_params(model, FLOAT32, jax.random.key(0))}
    gradients = jax.tree.map(jnp.ones_like, params)
    settings = OptimizerConfig(name="adamw", weight_decay=0.0, clip_norm=0.0, warmup_steps=1)
    found = []
    for rates in ((), family_of(model).rates(model)):
        chain = optim.make_optimizer(settings, 10, ".*", rates)
        found.append(chain.update(gradients, chain.init(params), params)[0]["model"])
    plain, scaled = found
    for names, rate in (
        (("embed", "embedding"), 2.0),
        (("head", "kernel"), 2.0),
        (("stage", "router", "query"), 2.0),
        (("stage", "inner", "router", "query"), 1.5),
        (("stage", "inner", "inner", "stack", "final_norm", "scale"), 1.0),
    ):
        before, after = plain, scaled
        for name in names:
            before, after = before[name], after[name]
        np.testing.assert_allclose(after, rate * np.asarray(before), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder_blocks": (1,)}, r"model.encoder_blocks=\(1,\) must have 2 positive numbers"),
        ({"decoder_blocks": (1, 0)}, r"model.decoder_blocks=\(1, 0\) must have 2 positive numbers"),
        ({"inner_widths": (64, 48)}, "must grow from model.width=32"),
        ({"stage_rates": (1.0,)}, r"model.stage_rates=\(1.0,\) must have 3 positive numbers"),
        ({"dropout": 0.1}, "this family has no dropout"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    values = {**dataclasses.asdict(STAGED), **changes}
    with pytest.raises(UserError, match=said):
        from_config_dict({"model": values, "train": {"sequence_length": 32}, "eval": {"sample_tokens": 0}})


def test_numbers_in_a_sequence_are_checked() -> None:
    with pytest.raises(UserError, match=r"model.inner_widths=\(48, '64'\): expected a sequence of whole numbers"):
        from_config_dict({"model": {"family": "hnet", "inner_widths": (48, "64")}})
    with pytest.raises(UserError, match=r"model.stage_rates=\[True\]: expected a sequence of numbers"):
        from_config_dict({"model": {"family": "hnet", "stage_rates": [True]}})


def config_of(root: Path, model: HnetConfig, **train: Any) -> Config:
    config = default_config("hnet")
    config.name = "bytes"
    config.model.update(dataclasses.asdict(model))
    config.compute.dtype = "float32"
    config.tokenizer.kind = "bytes"
    config.data.update(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2)
    config.train.update(**{"steps": 8, "batch_size": 8, "sequence_length": 32, "log_every": 1, **train})
    config.optimizer.update(name="muon", warmup_steps=2, learning_rate=0.01, schedule="constant")
    config.eval.update(every=4, batches=2, sample_tokens=4, sample_prompts=("def ",))
    config.checkpoint.update(every=4, keep=3)
    config.log.update(tensorboard=False, charts_every=0)
    return from_config_dict(config)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `code`, `data` and a run of 8 steps, `run`."""
    root = tmp_path_factory.mktemp("hnet")
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(config_of(root, TRAINED), root / "run")
    return root


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}


def test_it_learns_and_generates(root: Path) -> None:
    found = losses(root / "run")
    assert found[8] < found[1] - 0.3
    model = smallcoder_jax.load(root / "run")
    together = model.generate(["def ", "x"], max_tokens=8, temperature=0.0)
    assert together[1].token_ids == model.generate("x", max_tokens=8, temperature=0.0)[0].token_ids


def test_it_resumes_to_the_last_bit(root: Path, tmp_path: Path) -> None:
    run.train(config_of(root, TRAINED, steps=4), tmp_path)
    assert run.train(config_of(root, TRAINED), tmp_path).step == 8
    params = [smallcoder_jax.load(folder, step=8).params for folder in (root / "run", tmp_path)]
    assert max_difference(*params) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8)])
def test_split_over_a_mesh_it_learns_the_same(mesh: MeshConfig, root: Path, tmp_path: Path) -> None:
    """For as long as no decision is another one: sums in another order move a weight across the border between two
    signs, or a position across one half, after some updates, and then the runs part."""
    run.train(dataclasses.replace(config_of(root, TRAINED), mesh=mesh), tmp_path)
    found, alone = losses(tmp_path), losses(root / "run")
    first = range(1, 5)
    assert [found[step] for step in first] == pytest.approx([alone[step] for step in first], rel=1e-3)
    assert found[8] == pytest.approx(alone[8], rel=0.02)
