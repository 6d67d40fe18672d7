"""The door for families of models: a second one, which lives in this file alone, does all that the decoder does.

It is a recurrent network of two layers: h_t = a_t h_{t-1} + (1 - a_t) v_t, with gates a_t in (0, 1) from the input.
What it touches outside of this file is one entry of `families.FAMILIES`.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

import smallcoder_jax
from smallcoder_jax import run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, Config, MeshConfig, ModelConfig, default_config, from_config_dict
from smallcoder_jax.config.fields import number
from smallcoder_jax.layers.embedding import Embedding
from smallcoder_jax.layers.linear import Linear
from smallcoder_jax.layers.norm import RMSNorm
from smallcoder_jax.mesh import make_mesh
from smallcoder_jax.models import build, families
from smallcoder_jax.models.family import Family, Hidden
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.stages.shared.next_token import make_loss
from tests.helpers import FLOAT32, max_difference, packed_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")

PACKAGE = Path(smallcoder_jax.__file__).parent


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    family: Literal["recurrent"] = "recurrent"
    layers: int = number(2, low=1)

    def parameter_count(self) -> int:
        return self.vocab_size * self.width + self.layers * (3 * self.width**2 + self.width) + self.width

    def divided(self) -> Mapping[str, Mapping[str, int]]:
        return {"tensor": {"vocab_size": self.vocab_size, "width": self.width}, "fsdp": {"width": self.width}}

    def summary(self) -> str:
        return f"{self.layers} recurrent layers of width {self.width}"


class Cell(nnx.Module):
    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs):
        made = {"bias": False, "std": width**-0.5, "dtype": dtype, "rngs": rngs}
        self.norm = RMSNorm(width, 1e-6)
        self.gate, self.value, self.output = (Linear(width, width, **made) for _ in range(3))

    def __call__(self, x_BTD: Array, begins_BT: Array, real_BT: Array, state_BD: Array) -> tuple[Array, Array]:
        """The outputs, and the state behind the last position. Padding leaves the state as it is."""
        normed_BTD = self.norm(x_BTD)
        keep_BTD = jax.nn.sigmoid(self.gate(normed_BTD) + 2.0)
        new_BTD = (1 - keep_BTD) * self.value(normed_BTD)
        keep_BTD = jnp.where(begins_BT[..., None], 0.0, keep_BTD)
        keep_BTD = jnp.where(real_BT[..., None], keep_BTD, 1.0)
        new_BTD = jnp.where(real_BT[..., None], new_BTD, 0.0)

        def after(first: Any, second: Any) -> Any:
            return first[0] * second[0], first[1] * second[0] + second[1]

        kept_BTD, state_BTD = jax.lax.associative_scan(after, (keep_BTD, new_BTD), axis=1)
        state_BTD = state_BTD + kept_BTD * state_BD[:, None]
        return x_BTD + self.output(state_BTD), state_BTD[:, -1]


class Recurrent(nnx.Module):
    def __init__(self, model: RecurrentConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.width, dtype = model.width, jnp.dtype(compute.dtype)
        self.embed = Embedding(model.vocab_size, model.width, rngs=rngs)
        self.blocks = nnx.List([Cell(model.width, dtype, rngs=rngs) for _ in range(model.layers)])
        self.final_norm = RMSNorm(model.width, 1e-6)

    def __call__(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array, dropout_key: Array | None = None
    ) -> Hidden:
        del dropout_key
        states_BTD, _ = self.extend(
            tokens_BT, positions_BT, segment_ids_BT, [jnp.zeros((len(tokens_BT), self.width))] * len(self.blocks)
        )
        real_BT = (segment_ids_BT > 0).astype(jnp.float32)
        energy = 0.01 * jnp.sum(jnp.mean(states_BTD**2, axis=-1) * real_BT)
        return Hidden(states_BTD, {"energy": (energy, jnp.sum(real_BT))})

    def extend(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array, cache: list[Array]
    ) -> tuple[Array, list[Array]]:
        x_BTD, cache = self.embed(tokens_BT), list(cache)
        for layer, cell in enumerate(self.blocks):
            x_BTD, cache[layer] = cell(x_BTD, positions_BT == 0, segment_ids_BT > 0, cache[layer])
        return self.final_norm(x_BTD), cache

    def unembedding(self) -> Array:
        return self.embed.embedding[...]


FAMILY = Family(
    module=Recurrent,
    init_cache=lambda model, compute, rows, length: [jnp.zeros((rows, model.width))] * model.layers,
    sharding=(
        (r"embed/embedding", P("tensor", "fsdp")),
        (r".*(gate|value)/kernel", P("fsdp", "tensor")),
        (r".*output/kernel", P("tensor", "fsdp")),
        (r".*scale", P()),
    ),
    muon=r"blocks/.*/kernel",
    flops_per_token=lambda model, length: 6.0 * model.parameter_count(),
    attention_shape=lambda model, length: None,
    published="no program of others computes it",
    logged=lambda model: ("energy",),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "recurrent", FAMILY)  # the one line


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of `code`, `data` and a run of 12 steps, `run`."""
    root = tmp_path_factory.mktemp("families")
    (root / "code").mkdir()
    for number_of in range(40):
        text = f"def function_{number_of}(x):\n    # adds {number_of} to x\n    return x + {number_of}\n"
        (root / "code" / f"f{number_of:02d}.py").write_text(text)
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setitem(families.FAMILIES, "recurrent", FAMILY)
        run.train(config_of(root), root / "run")
        yield root


def config_of(root: Path, **train: Any) -> Config:
    config = default_config("recurrent")
    config.name = "recurrent"
    config.model.update(vocab_size=256, width=32, context=64)
    config.compute.dtype = "float32"
    config.tokenizer.kind = "bytes"
    config.data.update(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2)
    config.train.update(**{"steps": 12, "batch_size": 8, "sequence_length": 32, "log_every": 1, **train})
    config.optimizer.update(name="muon", warmup_steps=2, learning_rate=0.01, schedule="constant")
    config.eval.update(every=6, batches=2, sample_tokens=8, sample_prompts=("def ",))
    config.checkpoint.update(every=6, keep=3)
    config.log.update(tensorboard=False, charts_every=0)
    return from_config_dict(config)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_its_own_loss_is_logged(root: Path) -> None:
    lines = [line for line in metrics(root / "run") if "grad_norm" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(0 < line["energy"] < 0.02 for line in lines)  # a hundredth of the mean square of what is normed


def test_its_own_loss_is_part_of_what_is_minimised() -> None:
    model = RecurrentConfig(vocab_size=97, width=32, context=64)
    config = dataclasses.replace(from_config_dict({"model": dataclasses.asdict(model), **SMALL}), compute=FLOAT32)
    batch = {name: jnp.asarray(value) for name, value in packed_batch(model, 2, 32, seed=0).items()}
    params = {"model": build.init_params(model, FLOAT32, jax.random.key(0))}
    loss, weight, sums = make_loss(config)(params, batch, None)
    module = build.bind(build.abstract_model(model, FLOAT32)[0], params["model"])
    energy, own = module(batch["tokens"], batch["positions"], batch["segment_ids"]).losses["energy"]
    assert float(loss / weight) == pytest.approx(float(sums["nats"] / weight + energy / own), rel=1e-6)


SMALL: dict[str, Any] = {"train": {"sequence_length": 32}, "eval": {"sample_tokens": 0}}


def test_it_is_evaluated_like_any_other(root: Path) -> None:
    _, rows = read_csv(root / "run" / "eval_log.csv")
    assert [row["step"] for row in rows] == [6, 12]
    assert all(0 < row["energy"] < 0.02 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    after = run.evaluate_run(root / "run", config_of(root))
    assert after["bits_per_byte"] < 8


def test_a_cache_goes_on_as_the_whole_row_does() -> None:
    model = RecurrentConfig(vocab_size=97, width=32, context=64)
    params = build.init_params(model, FLOAT32, jax.random.key(0))
    module = build.bind(build.abstract_model(model, FLOAT32)[0], params)
    batch = packed_batch(model, 2, 32, seed=3, cuts=1)
    inputs = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    whole = module(*inputs).states_BTD
    cache, parts, at = FAMILY.init_cache(model, FLOAT32, 2, 32), [], 0
    for size in (11, 1, 20):
        part, cache = module.extend(*(x[:, at : at + size] for x in inputs), cache)
        parts.append(part)
        at += size
    real = batch["segment_ids"] > 0
    assert np.abs(np.asarray(jnp.concatenate(parts, axis=1) - whole))[real].max() < 1e-5


def test_it_generates_the_same_in_any_batch(root: Path) -> None:
    model = smallcoder_jax.load(root / "run")
    assert f"{model.model.parameter_count():,} parameters" in repr(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == model.model.parameter_count()
    together = model.generate(["def ", "x"], max_tokens=12, temperature=0.0)
    alone = model.generate("x", max_tokens=12, temperature=0.0)[0]
    assert together[1].token_ids == alone.token_ids
    assert len(alone.token_ids) == 12


def test_it_resumes_to_the_last_bit(root: Path, tmp_path: Path) -> None:
    config = config_of(root)
    run.train(config_of(root, steps=6), tmp_path)
    assert run.train(config, tmp_path).step == 12
    last = [smallcoder_jax.load(folder, step=12).params for folder in (root / "run", tmp_path)]
    assert max_difference(*last) == 0.0


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow)]
)
def test_split_over_a_mesh_it_learns_the_same(mesh: MeshConfig, root: Path, tmp_path: Path) -> None:
    run.train(dataclasses.replace(config_of(root), mesh=mesh), tmp_path)
    whole, split = (
        {line["step"]: line["loss"] for line in metrics(folder) if "grad_norm" in line}
        for folder in (root / "run", tmp_path)
    )
    assert split == pytest.approx(whole, rel=1e-4)
    found = [smallcoder_jax.load(folder, step=12).params for folder in (root / "run", tmp_path)]
    assert max_difference(*found) < 1e-4


def test_what_does_not_divide_over_the_mesh_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.width=33 does not divide over mesh.tensor=2"):
        make_mesh(MeshConfig(tensor=2), RecurrentConfig(vocab_size=256, width=33), 8)


def test_the_export_refuses_it_with_the_reason(root: Path, tmp_path: Path) -> None:
    from tools import export

    with pytest.raises(UserError, match=r"model.family='recurrent' cannot be exported: no program of others"):
        export.main([f"--checkpoint={root / 'run'}", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    assert not any("tools.export" in command for command in run.next_commands(config_of(root), root / "run"))


def test_another_family_is_no_start_for_it(root: Path, tmp_path: Path) -> None:
    decoder = default_config()
    decoder.model.update(vocab_size=256, width=32, context=64, heads=2, kv_heads=1, head_size=16, mlp_width=32)
    config = dataclasses.replace(config_of(root), model=from_config_dict({**decoder.to_dict(), **SMALL}).model)
    config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, start=str(root / "run")))
    with pytest.raises(UserError, match="of another family: recurrent there, decoder here"):
        run.train(config, tmp_path)


def test_a_family_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.family='mamba': expected one of 'decoder', "):
        from_config_dict({"model": {"family": "mamba"}})
    with pytest.raises(UserError, match=r"unknown config key 'model\.heads'"):
        from_config_dict({"model": {"family": "recurrent", "heads": 2}})


def imported(path: Path) -> set[str]:
    """Modules, and names from them, as `module.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_a_family_is_its_folder_its_section_and_one_line() -> None:
    """The second family touched two files, this one and, were it not for the tests alone, `families.py`: nothing else
    knows the first by name."""
    knows, section = set(), set()
    for path in PACKAGE.rglob("*.py"):
        name, names = path.relative_to(PACKAGE).as_posix(), imported(path)
        if any(module.startswith("smallcoder_jax.models.decoder") for module in names):
            knows.add(name)
        if any(module.endswith(".DecoderConfig") for module in names):
            section.add(name)
    assert {name for name in knows if not name.startswith("models/decoder/")} == {"models/families.py"}
    outside = {name for name in section if not name.startswith("models/decoder/")}
    assert outside == {"config/__init__.py", "config/schema.py"}  # the default
    here = {path for path in PACKAGE.rglob("*.py") if '"recurrent"' in path.read_text()}
    assert not here
