"""The device mesh, and which of its axes splits which dimension of each parameter."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import MeshConfig, ModelConfig

AXES = ("data", "fsdp", "context", "tensor")
TOKEN_AXES = ("data", "fsdp", "context")  # the axes along which devices hold different tokens
ROWS = P(("data", "fsdp"))
BATCH = P(("data", "fsdp"), "context")  # rows and tokens of [B, T, ...]
TOKENS = P(TOKEN_AXES)  # tokens of [X, ...], in the order of `flat_tokens`
HEADS = P(("data", "fsdp"), "context", "tensor", None)  # rows, tokens and heads of [B, T, N, H]
CHANNELS = P(("data", "fsdp"), None, "tensor")  # rows and channels of [B, T, E]

# The rules of a model family: name pattern -> how the parameter is split in the unrolled layout. The first match
# counts.
Rules = Sequence[tuple[str, P]]
_OF_EVERY_FAMILY: Rules = ((r"head/(kernel|bias)", P()), (r"lora_scale", P()))


def make_mesh(mesh: MeshConfig, model: ModelConfig, batch_size: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. Raises UserError where the mesh's shape, the devices and the model do not fit together.

    `batch_size` is the number of rows in one forward pass (a microbatch).
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(mesh, len(devices))
    check_rows(sizes, batch_size, "train.batch_size, or train.microbatch_size where it is set")
    for axis, why in model.WHOLE.items():
        if sizes[axis] > 1:
            raise UserError(
                f"mesh.{axis}={sizes[axis]}: models with model.family={model.family!r} need 1, because {why}"
            )
    for axis, named in model.divided().items():
        for name, value in named.items():
            if value % sizes[axis]:
                raise UserError(f"model.{name}={value} does not divide over mesh.{axis}={sizes[axis]}")
    placed = place_devices(sizes, devices)
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(placed)
    along = AXES.index("context")
    if (processes != processes.take([0], axis=along)).any():
        raise UserError(
            f"mesh.context={sizes['context']} splits a row over the devices of several processes, and a process reads "
            f"whole rows; make mesh.context x mesh.tensor divide the {np.sum(processes == processes.flat[0])} devices "
            "of a process"
        )
    return Mesh(placed, AXES)


def place_devices(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of the mesh's shape, with neighbours on the chips' network next to each other. Where they
    belong to several slices (TPU slices, or GPU nodes), which a slower network connects, `data` is split over the
    slices, and `fsdp` where `data` does not suffice. Raises UserError where another axis would have to be.
    """
    slices = len({slice_of(device) for device in devices})
    data = math.gcd(sizes["data"], slices)
    fsdp = slices // data
    if sizes["fsdp"] % fsdp:
        raise UserError(
            f"mesh {dict(sizes)} splits rows or layers over {slices} slices, between which the network is slow; make "
            f"mesh.data x mesh.fsdp a multiple of {slices}"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    if sizes["context"] > 1:  # keep the devices of a process next to each other, because a process reads whole rows
        placed = sorted(devices, key=lambda device: (slice_of(device), device.process_index))
        return np.asarray(placed).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = (shape[0] // data, shape[1] // fsdp, *shape[2:])
    return mesh_utils.create_hybrid_device_mesh(within, (data, fsdp, 1, 1), devices, allow_split_physical_axes=True)


def slice_of(device: Any) -> int:
    """The slice that a device belongs to; all CPUs count as one slice."""
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", 0)


def mesh_sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis of a mesh over `devices`. Raises UserError where their product is not `devices`."""
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "context": mesh.context, "tensor": mesh.tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: sizes are positive, and at most one is -1 (all remaining devices)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise UserError(f"mesh {sizes} does not multiply to the {devices} devices; set one axis to -1")
    return sizes


def row_devices(sizes: Mapping[str, int]) -> int:
    """The number of parts that the rows of a batch are split into on a mesh of these sizes."""
    return sizes["data"] * sizes["fsdp"]


def check_rows(sizes: Mapping[str, int], rows: int, name: str) -> None:
    """Raises UserError when a batch of `rows` rows (the setting `name`) cannot be split evenly over the mesh."""
    devices = row_devices(sizes)
    if rows % devices:
        raise UserError(
            f"a batch of {rows} rows ({name}) does not divide over {devices} = mesh.data x mesh.fsdp devices; "
            f"use a multiple of {devices}"
        )


def check_length(sizes: Mapping[str, int], length: int) -> None:
    """Raises UserError when rows of `length` tokens cannot be split evenly over the mesh."""
    if length % sizes["context"]:
        raise UserError(
            f"train.sequence_length={length} does not divide over mesh.context={sizes['context']}; "
            f"use a multiple of {sizes['context']}"
        )


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree key path as `blocks/0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter of one of the parts of `models.build`: as `path_name`, without the part `model`."""
    return path_name(tuple(key for key in path if key != jax.tree_util.DictKey("model")))


def spec_of(rules: Rules, name: str, ndim: int) -> P:
    """How the parameter `name` (or its optimizer state) is split; in scanned blocks it has a leading layer axis.

    The parameters of a teacher and of a critic are split like a model's. An adapter's `a` is split like the input of
    its kernel, and `b` like the output. Their product is then split like the kernel, and computing it takes no
    communication. Raises KeyError when no rule matches, because every new parameter needs a rule.
    """
    kernel, adapter, side = re.sub("^(teacher|critic|lora)/", "", name), "", ""
    if name.startswith("lora/"):
        kernel, adapter, side = kernel.rpartition("/")
    for pattern, spec in (*rules, *_OF_EVERY_FAMILY):
        if re.fullmatch(pattern, kernel):
            if adapter:
                spec = P(spec[0], None) if side == "a" else P(None, spec[1])
            axes = max(ndim - len(spec), 0) if re.search(r"(^|/)blocks/(?!\d)", kernel) else 0
            return P(*[None] * (axes if spec else 0), *spec)
    raise KeyError(f"no sharding rule for parameter '{name}'")


def params_sharding(mesh: Mesh, params: Any, rules: Rules) -> Any:
    """A NamedSharding for every leaf of `params` (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(rules, parameter_name(path), leaf.ndim)), params
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`, and each row's tokens over `context`."""
    return NamedSharding(mesh, BATCH)


def process_rows(mesh: Mesh, rows: int) -> list[int]:
    """The indices, ascending, of the rows of a global batch of `rows` rows that the devices of this process hold."""
    held = NamedSharding(mesh, ROWS).addressable_devices_indices_map((rows,)).values()
    return sorted({int(row) for index in held if index is not None for row in np.arange(rows)[index]})


def place_batch(sharding: NamedSharding, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places the global batch on the devices. `batch` holds this process's rows, those of `process_rows`."""
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def split_activations(x: jax.Array) -> jax.Array:
    """`x` [B, T, ...] with its rows and tokens split like the batch, where it is traced for a mesh.

    The residual stream needs this: otherwise XLA would split it like the embedding's width, over `fsdp`, and every
    device would process all rows.
    """
    return x if jax.sharding.get_abstract_mesh().size <= 1 else jax.lax.with_sharding_constraint(x, BATCH)


def flat_tokens(x: jax.Array) -> jax.Array:
    """[B, T, ...] to [B T, ...]. On a mesh that splits rows along their length, the tokens of each device stay
    together, so that none has to move. The order then differs from that of the rows, but is the same for every array.
    """

    def flatten(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    if context_size() == 1:
        return flatten(x)
    return jax.shard_map(flatten, in_specs=BATCH, out_specs=TOKENS, axis_names=set(TOKEN_AXES), check_vma=False)(x)


def context_size() -> int:
    """The number of devices over which the mesh that is traced for splits each row along its length."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def tensor_size() -> int:
    """The number of devices over which the mesh that is traced for splits heads and channels."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def traced_device() -> Any:
    """The device that is traced for: the abstract mesh's, which need not exist here, or else jax's first device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def whole_width(table: jax.Array) -> jax.Array:
    """`table` [entries, width], gathered along its width where it is traced for a mesh, so that each device looks up
    the rows that it needs. Otherwise XLA would gather the ids of the whole batch.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return table
    return jax.lax.with_sharding_constraint(table, P(P.UNCONSTRAINED, None))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that the code inside it knows the mesh, as kernels must, which are split by hand."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced
