"""The jax side of `kernels` and `tune_kernels`: checks and times implementations of attention with RoPE.

    python -m tools.bench.attention_jax < JOB        (what `tools.bench.kernels` runs)

Whatever an attention needs in addition to q, k and v is an argument of the compiled programs, never a constant in them,
because XLA computes with constants during compilation and stores the results. For the mask of a row of 8192 tokens this
would take hundreds of megabytes, and minutes.

Shapes: B batch, T tokens, S keys, N query heads, K key heads, H head size, h = H / 2.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import UserError, run_cli
from smallcoder_jax.kernels import flash_hopper, flash_tpu
from smallcoder_jax.kernels.tile_table import lookup
from smallcoder_jax.kernels.tiles import HopperTiles, TpuTiles
from smallcoder_jax.ops.attention_xla import Keys, Queries, attend_xla
from tools.bench import packed_rows
from tools.bench.packed_rows import ALL, BOUND, GRADIENTS, THETA, Shape


class Case(NamedTuple):
    """The arrays of a shape on the device."""

    q_BTNH: Array
    k_BTKH: Array
    v_BTKH: Array
    do_BTNH: Array
    segment_ids_BT: Array
    positions_BT: Array
    cos_BTh: Array
    sin_BTh: Array


Attend = Partial  # a function of q, k and v; the arrays that it contains are its leaves


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of attention. `why_not` says why it cannot run here, or returns None. `make` returns the
    function of q, k and v for a case.

    `masks`: the passes that compute pairs of different documents and then mask them. `no_backward`: why it has no
    backward pass, or None.
    """

    name: str
    masks: tuple[str, ...]
    why_not: Callable[[Shape], str | None]
    make: Callable[[Shape, Case], Attend]
    no_backward: str | None = None


def make_case(shape: Shape, dtype: str = "bfloat16") -> Case:
    segments = shape.segment_ids()
    q, k, v, do = (jnp.asarray(x).astype(dtype) for x in shape.inputs())
    cos, sin = (jnp.asarray(x) for x in packed_rows.rotation(shape, THETA))
    return Case(q, k, v, do, jnp.asarray(segments), jnp.asarray(packed_rows.positions(segments)), cos, sin)


def rotated(x_BTNH: Array, case: Case) -> Array:
    """RoPE computed by XLA, for attentions that do not rotate themselves."""
    cos, sin = case.cos_BTh[:, :, None, :], case.sin_BTh[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def xla(shape: Shape, case: Case) -> Attend:
    """The reference."""

    return Partial(_xla, case)


def _xla(case: Case, q: Array, k: Array, v: Array) -> Array:
    queries = Queries(rotated(q, case), case.positions_BT, case.segment_ids_BT)
    return attend_xla(queries, Keys(rotated(k, case), v, case.positions_BT, case.segment_ids_BT), None)


@jax.jit
def _forward(attend: Attend, q: Array, k: Array, v: Array) -> Array:
    return attend(q, k, v)


@jax.jit
def _pull(attend: Attend, q: Array, k: Array, v: Array) -> Any:
    return jax.vjp(attend, q, k, v)[1]


@jax.jit
def _backward(pull: Any, do: Array) -> tuple[Array, ...]:
    return pull(do)


@jax.jit
def _both(attend: Attend, q: Array, k: Array, v: Array, do: Array) -> tuple[Array, ...]:
    """The gradients after both passes. The output is computed for them, but is not a result."""
    return jax.vjp(attend, q, k, v)[1](do)


@jax.jit
def _everything(attend: Attend, q: Array, k: Array, v: Array, do: Array) -> tuple[Array, ...]:
    o, pull = jax.vjp(attend, q, k, v)
    return o, *pull(do)


def run(attend: Attend, case: Case) -> tuple[Array, ...]:
    """The output, and the gradients of q, k and v."""
    return _everything(attend, *case[:4])


def truth(shape: Shape, case: Case) -> tuple[np.ndarray, ...]:
    """Output and gradients of the reference, computed in float32 from the case's rounded inputs."""
    exact = case._replace(**{name: getattr(case, name).astype(jnp.float32) for name in Case._fields[:4]})
    return tuple(np.asarray(x) for x in run(xla(shape, exact), exact))


def errors(attend: Attend, case: Case, want: tuple[np.ndarray, ...], backward: bool = True) -> dict[str, float]:
    """Relative errors of the output and, with `backward`, of the three gradients."""
    got = run(attend, case) if backward else (_forward(attend, *case[:3]),)
    floats = (np.asarray(x.astype(jnp.float32)) for x in got)
    return {name: packed_rows.relative_error(a, b) for name, a, b in zip(GRADIENTS, floats, want, strict=False)}


def times(attend: Attend, case: Case, backward: bool = True) -> dict[str, float]:
    """Seconds of the forward pass, of the backward pass alone, and of both in one program."""
    q, k, v, do = case[:4]
    timed = functools.partial(packed_rows.seconds_per_call, wait=jax.block_until_ready)
    found = {"forward": timed(lambda: _forward(attend, q, k, v))}
    if backward:
        pull = _pull(attend, q, k, v)
        found["backward"] = timed(lambda: _backward(pull, do))
        found["both"] = timed(lambda: _both(attend, q, k, v, do))
    return found


def measure(contender: Contender, shape: Shape, case: Case, want: tuple[np.ndarray, ...], time: bool) -> dict[str, Any]:
    """The reason why the contender cannot run at this shape, or its errors and, if `time` and they are small enough,
    its times."""
    if reason := contender.why_not(shape):
        return {"why_not": reason}
    backward = contender.no_backward is None
    attend = contender.make(shape, case)
    found: dict[str, Any] = {"errors": errors(attend, case, want, backward), "no_backward": contender.no_backward}
    if time and max(found["errors"].values()) <= BOUND:
        found["seconds"] = times(attend, case, backward)
    return found


def platform_is(wanted: str) -> str | None:
    """Why a contender for the platform `wanted` cannot run, or None."""
    found = jax.default_backend()
    return None if found == wanted else f"needs a {wanted}; this is a {found}"


class Kernel(NamedTuple):
    """A kernel of ours: its platform, the class of its tiles, why it does not support a shape (`obstacle`, a function
    of length, group, head size, type, tiles and device kind), and the argument that makes it interpreted.
    """

    name: str
    platform: str
    tiles: type[Any]
    flash_attention: Callable[..., Array]
    obstacle: Callable[..., str | None]
    interpret: Any

    def attend(self, case: Case, tiles: Any, interpret: bool) -> Attend:
        chosen = _with_tiles(self.flash_attention, tiles, self.interpret if interpret else None)
        return Partial(chosen, segment_ids_BT=case.segment_ids_BT, rotation=(case.cos_BTh, case.sin_BTh))

    def contender(self, interpret: bool) -> Contender:
        def tiles(shape: Shape) -> Any:
            group = shape.heads // shape.kv_heads
            return lookup(self.tiles, jax.devices()[0].device_kind, shape.size, group, shape.length).tiles

        def why_not(shape: Shape) -> str | None:
            if not interpret and (reason := platform_is(self.platform)):
                return reason
            group, device = shape.heads // shape.kv_heads, None if interpret else jax.devices()[0].device_kind
            return self.obstacle(shape.length, group, shape.size, "bfloat16", tiles(shape), device)

        def make(shape: Shape, case: Case) -> Attend:
            return self.attend(case, tiles(shape), interpret)

        return Contender(f"ours, {self.name}", (), why_not, make)


@functools.cache
def _with_tiles(flash_attention: Callable[..., Array], tiles: Any, interpret: Any) -> Callable[..., Array]:
    """The same function object for equal arguments, so that it is compiled only once."""
    options = {} if interpret is None else {"interpret": interpret}
    return functools.partial(flash_attention, window=None, tiles=tiles, **options)


# Public only in newer versions of jax.
_GPU_INTERPRETER: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
KERNELS = (
    Kernel("pallas_tpu", "tpu", TpuTiles, flash_tpu.flash_attention, flash_tpu.obstacle, True),
    Kernel(
        "pallas_gpu", "gpu", HopperTiles, flash_hopper.flash_attention, flash_hopper.obstacle,
        _GPU_INTERPRETER.InterpretGPUParams(),
    ),
)  # fmt: skip


def cudnn_why_not(shape: Shape) -> str | None:
    return platform_is("gpu")


def cudnn(shape: Shape, case: Case) -> Attend:
    """Causal, or with a dense mask, since jax's interface to cuDNN takes no segment ids."""
    mask = None
    if shape.mean is not None:
        same_BTS = case.segment_ids_BT[:, :, None] == case.segment_ids_BT[:, None, :]
        mask = same_BTS[:, None]
    return Partial(_cudnn, case, mask)


def _cudnn(case: Case, mask: Array | None, q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(
        rotated(q, case), rotated(k, case), v, mask=mask, is_causal=True, implementation="cudnn"
    )


def cudnn_offsets_why_not(shape: Shape) -> str | None:
    if shape.mean is None:
        return "the same as without offsets"
    return platform_is("gpu")


def cudnn_offsets(shape: Shape, case: Case) -> Attend:
    """cuDNN's packed layout, given by the start and length of each document. jax has no public function for it."""
    attention: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    borders = packed_rows.document_borders(np.asarray(case.segment_ids_BT))
    most = max(map(len, borders)) - 1
    starts = jnp.asarray([row + [-1] * (most + 1 - len(row)) for row in borders], jnp.int32)
    lengths = jnp.asarray([[*np.diff(row).tolist(), *[-1] * (most + 1 - len(row))] for row in borders], jnp.int32)

    def attend(case: Case, lengths: Array, starts: Array, q: Array, k: Array, v: Array) -> Array:
        return attention.dot_product_attention(
            rotated(q, case), rotated(k, case), v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts,
            kv_offsets=starts, scale=shape.size**-0.5, mask_type=attention.MaskType.PADDING_CAUSAL,
        )  # fmt: skip

    return Partial(attend, case, lengths, starts)


def splash_contender(interpret: bool) -> Contender:
    """jax's own TPU kernel, which masks documents by segment ids, with large blocks and one backward kernel."""
    kernel: Any = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    masks: Any = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")

    def why_not(shape: Shape) -> str | None:
        if shape.size % 128 and not interpret:
            return f"needs heads of a multiple of 128, not {shape.size}"
        return None if interpret else platform_is("tpu")

    def make(shape: Shape, case: Case) -> Attend:
        block = min(1024, shape.length)
        blocks = kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=min(512, block), block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=min(512, block), use_fused_bwd_kernel=True,
        )  # fmt: skip
        group = shape.heads // shape.kv_heads
        mask = masks.MultiHeadMask([masks.CausalMask((shape.length, shape.length))] * group)
        one_key_head = kernel.make_splash_mqa(
            mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )

        def one_row(one_key_head: Any, q_KGTH: Array, k_KTH: Array, v_KTH: Array, segments_T: Array) -> Array:
            ids = kernel.SegmentIds(segments_T, segments_T)
            return jax.vmap(lambda q, k, v: one_key_head(q, k, v, segment_ids=ids))(q_KGTH, k_KTH, v_KTH)

        def attend(case: Case, one_key_head: Any, q: Array, k: Array, v: Array) -> Array:
            q = rotated(q, case) * jnp.asarray(shape.size**-0.5, q.dtype)  # the kernel does not scale
            q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q, rotated(k, case), v))
            q_BKGTH = q_BNTH.reshape(shape.rows, shape.kv_heads, group, shape.length, shape.size)
            rows = jax.vmap(functools.partial(one_row, one_key_head))
            return rows(q_BKGTH, k_BKTH, v_BKTH, case.segment_ids_BT).reshape(q_BNTH.shape).swapaxes(1, 2)

        return Partial(attend, case, one_key_head)

    return Contender("jax splash attention", ALL, why_not, make)


def mgpu_why_not(shape: Shape) -> str | None:
    if shape.mean is not None:
        return "does not support several documents"
    return platform_is("gpu")


def mgpu(shape: Shape, case: Case) -> Attend:
    """jax's example of a Hopper kernel, in float16, the only type of its intermediate values."""
    attention: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    config = attention.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)

    def attend(case: Case, q: Array, k: Array, v: Array) -> Array:
        scaled = rotated(q, case) * jnp.asarray(shape.size**-0.5, q.dtype)  # the kernel does not scale
        half = (x.astype(jnp.float16) for x in (scaled, rotated(k, case), v))
        return attention.attention(*half, config).astype(q.dtype)

    return Partial(attend, case)


def tokamax_contender(interpret: bool) -> Contender:
    """tokamax's Mosaic kernel. Documents are given by the first key that each query sees; only the forward pass skips
    by it."""
    implementation = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(jax.default_backend(), "xla")

    def why_not(shape: Shape) -> str | None:
        if importlib.util.find_spec("tokamax") is None:
            return "not installed: pip install tokamax"
        return platform_is("gpu") if implementation == "xla" and not interpret else None

    def make(shape: Shape, case: Case) -> Attend:
        attention: Any = importlib.import_module("tokamax._src.ops.attention.api")
        base: Any = importlib.import_module("tokamax._src.ops.attention.base")
        index_BT = jnp.arange(shape.length, dtype=jnp.int32)[None]
        starts = (index_BT - case.positions_BT)[:, None]

        def attend(case: Case, starts: Array, q: Array, k: Array, v: Array) -> Array:
            mask = base.Mask(k_start=starts, is_causal=True)
            return attention.IMPLEMENTATIONS[implementation](rotated(q, case), rotated(k, case), v, mask=mask)

        return Partial(attend, case, starts)

    return Contender("tokamax", ("backward",), why_not, make)


def contenders(interpret: bool) -> list[Contender]:
    """All jax contenders, ours first. `interpret`: run Pallas kernels without their device, to check this program."""
    return [
        *(kernel.contender(interpret) for kernel in KERNELS),
        Contender("XLA, the reference", ALL, lambda shape: None, xla),
        Contender("cuDNN through jax", ALL, cudnn_why_not, cudnn),
        Contender("cuDNN, packed layout", (), cudnn_offsets_why_not, cudnn_offsets),
        splash_contender(interpret),
        Contender("jax Pallas Mosaic GPU", ALL, mgpu_why_not, mgpu, no_backward="no causal backward"),
        tokamax_contender(interpret),
    ]


def main() -> None:
    """Reads a job as JSON from stdin and prints results as JSON lines. Raises UserError without a device to time on."""
    job = json.load(sys.stdin)
    device = jax.devices()[0]
    if job["time"] and device.platform == "cpu":
        raise UserError(
            "kernels are timed on a GPU or a TPU, and jax found a CPU; --dry-run checks this program on one"
        )
    say(json.dumps({"device": device.device_kind, "software": f"jax {jax.__version__}"}))
    for fields in job["shapes"]:
        shape = Shape(**fields)
        case = make_case(shape)
        want = truth(shape, case)
        for contender in packed_rows.named(contenders(interpret=not job["time"]), job["contenders"]):
            try:
                result = measure(contender, shape, case, want, job["time"])
            except Exception as error:  # a failure at one shape becomes a cell of the table; the others still run
                result = {"why_not": packed_rows.failure(error)}
            line = {"contender": contender.name, "masks": contender.masks, "shape": fields, **result}
            say(json.dumps(line))


if __name__ == "__main__":
    run_cli(main)
