"""The one entry point to linear recurrences, with their gradients written out.

Shapes: B batch, T tokens, E channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.kernels import recurrence_hopper, recurrence_tpu
from smallcoder_jax.mesh import CHANNELS, context_size, tensor_size, traced_device

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # xla runs on any
KERNELS = {platform: kernel for kernel, platform in PLATFORMS.items()}
SHORTEST = 16  # positions of a row for which `auto` chooses a kernel; kernels pad shorter rows


class Choice(NamedTuple):
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


def choose(
    implementation: str, length: int, width: int, dtypes: Iterable[DTypeLike] = (), platform: str | None = None,
    device: str | None = None, *, context: int = 1, tensor: int = 1,
) -> Choice:  # fmt: skip
    """Resolves `auto` for rows of `length` positions and `width` channels, where `keep` and `new` have these `dtypes`.

    `platform` and `device` (its kind) describe the devices. Without a platform, `auto` takes the platform of the mesh
    that is being traced for, and an explicit implementation is not checked against a platform. `context` and `tensor`:
    over how many devices each row is split along its length, and over how many the channels are. Raises UserError for
    an unknown name, and where the implementation asked for cannot serve the shape or the platform.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"recurrence implementation {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return Choice("xla", "asked for")
    asked = implementation != "auto"
    if asked and platform not in (None, PLATFORMS[implementation]):
        place = PLATFORMS[implementation].upper()
        raise UserError(f"recurrence implementation {implementation!r} runs on {place}s; the platform is '{platform}'")
    if not asked:
        platform = platform or traced_device().platform
        if platform not in KERNELS:
            return Choice("xla", f"the only one for platform '{platform}'")
        if length < SHORTEST:
            return Choice("xla", f"rows of {length} positions, fewer than {SHORTEST}")
        implementation = KERNELS[platform]
    if context > 1:
        obstacle = f"it serves whole rows, which mesh.context={context} splits"
    elif width % tensor:
        obstacle = f"mesh.tensor={tensor} does not divide the {width} channels"
    else:
        kernel: Any = recurrence_tpu if implementation == "pallas_tpu" else recurrence_hopper
        obstacle = kernel.obstacle(width // tensor, dtypes, device)
    if obstacle is None:
        return Choice(implementation, "asked for" if asked else f"platform '{platform}'")
    if asked:
        raise UserError(f"recurrence implementation {implementation!r}: {obstacle}; use auto or xla")
    return Choice("xla", f"{implementation}: {obstacle}")


def recurrence(
    keep_BTE: Float[Array, "B T E"],
    new_BTE: Float[Array, "B T E"],
    start_BE: Float[Array, "B E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B T E"]:
    """All h_t of h_t = keep_t h_{t-1} + new_t with h_{-1} = `start_BE`, in float32.

    A document begins where `keep` is 0, and a position with keep 1 and new 0 leaves the state as it is. The gradient is
    the same recurrence from the end: dnew_t = dh_t + keep_{t+1} dnew_{t+1} and dkeep_t = dnew_t h_{t-1}; its sums are
    float32, too. `implementation`: see `choose`; raises UserError where it cannot serve the shape.
    """
    _, length, width = keep_BTE.shape
    chosen = choose(
        implementation, length, width, (keep_BTE.dtype, new_BTE.dtype), device=traced_device().device_kind,
        context=context_size(), tensor=tensor_size(),
    )  # fmt: skip
    if chosen.implementation == "pallas_tpu":
        return _on_each_device(recurrence_tpu.recurrence, keep_BTE, new_BTE, start_BE)
    if chosen.implementation == "pallas_gpu":
        return _on_each_device(recurrence_hopper.recurrence, keep_BTE, new_BTE, start_BE)
    return _by_scan(keep_BTE.astype(jnp.float32), new_BTE.astype(jnp.float32), start_BE)


def _on_each_device(kernel: Callable[..., Array], keep_BTE: Array, new_BTE: Array, start_BE: Array) -> Array:
    """Runs `kernel` on a mesh, each device on its own rows and channels."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return kernel(keep_BTE, new_BTE, start_BE)
    in_specs = (CHANNELS, CHANNELS, P(CHANNELS[0], CHANNELS[2]))
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=CHANNELS, check_vma=False)(keep_BTE, new_BTE, start_BE)


@jax.custom_vjp
def _by_scan(keep_BTE: Array, new_BTE: Array, start_BE: Array) -> Array:
    """The reference: a scan of float32 arrays."""
    return _forward(keep_BTE, new_BTE, start_BE)[0]


def _forward(keep_BTE: Array, new_BTE: Array, start_BE: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    new_BTE = new_BTE.at[:, 0].add(keep_BTE[:, 0] * start_BE)
    h_BTE = _scan(keep_BTE, new_BTE, reverse=False)
    return h_BTE, (keep_BTE, h_BTE, start_BE)


def _backward(residuals: tuple[Array, Array, Array], dh_BTE: Array) -> tuple[Array, Array, Array]:
    keep_BTE, h_BTE, start_BE = residuals
    following_BTE = jnp.concatenate([keep_BTE[:, 1:], jnp.zeros_like(keep_BTE[:, :1])], axis=1)
    d_new_BTE = _scan(following_BTE, dh_BTE, reverse=True)
    before_BTE = jnp.concatenate([start_BE[:, None], h_BTE[:, :-1]], axis=1)
    return d_new_BTE * before_BTE, d_new_BTE, keep_BTE[:, 0] * d_new_BTE[:, 0]


_by_scan.defvjp(_forward, _backward)


def _scan(keep_BTE: Array, new_BTE: Array, *, reverse: bool) -> Array:
    """The recurrence for a state of 0, or from the end: position by position on a CPU, where this takes half the time
    of an associative scan (docs/LOG.md), and in a logarithmic number of passes elsewhere."""
    if keep_BTE.shape[1] == 1:
        return new_BTE
    if traced_device().platform != "cpu":
        return jax.lax.associative_scan(
            lambda first, second: (first[0] * second[0], first[1] * second[0] + second[1]),
            (keep_BTE, new_BTE),
            reverse=reverse,
            axis=1,
        )[1]

    def step(h_BE: Array, position: tuple[Array, Array]) -> tuple[Array, Array]:
        h_BE = position[0] * h_BE + position[1]
        return h_BE, h_BE

    by_position = jnp.moveaxis(keep_BTE, 1, 0), jnp.moveaxis(new_BTE, 1, 0)
    h_TBE = jax.lax.scan(step, jnp.zeros_like(new_BTE[:, 0]), by_position, reverse=reverse)[1]
    return jnp.moveaxis(h_TBE, 0, 1)
