"""The PyTorch side of `tools.bench.kernels`, which runs in a separate process and, if wanted, environment.

    python -m tools.bench.attention_torch < JOB        (what `tools.bench.kernels` runs)

Needs torch and numpy. On a GPU, RoPE is compiled by torch.compile, together with the attention if that compiles.

Shapes: B batch, T tokens, N query heads, K key heads, H head size, h = H / 2.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tools.bench import packed_rows
from tools.bench.packed_rows import ALL, BOUND, GRADIENTS, THETA, Shape

Attend = Callable[[Any, Any, Any], Any]


class Case(NamedTuple):
    """The arrays of a shape on the device: q, k, v and the output's gradient [B, T, heads, H], and RoPE's tables."""

    q: Any
    k: Any
    v: Any
    do: Any
    segments: Any  # [B, T]
    cos: Any  # [B, T, 1, h]
    sin: Any


@dataclasses.dataclass(frozen=True)
class Contender:
    """One attention, as in `attention_jax`; `why_not` also takes the `device` ("cuda" or "cpu")."""

    name: str
    masks: tuple[str, ...]  # passes that compute pairs of different documents and then mask them
    why_not: Callable[[Shape, str], str | None]
    make: Callable[[Any, Shape, Case], Attend]
    cpu_backward: bool = True  # whether it has a backward pass on a CPU


def make_case(torch: Any, shape: Shape, device: str) -> Case:
    q, k, v, do = (torch.from_numpy(x).to(device, torch.bfloat16) for x in shape.inputs())
    cos, sin = (torch.from_numpy(x).to(device)[:, :, None, :] for x in packed_rows.rotation(shape, THETA))
    segments = torch.from_numpy(shape.segment_ids()).to(device)
    return Case(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, segments, cos, sin)


def rotated(torch: Any, x: Any, case: Case) -> Any:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * case.cos - second * case.sin, second * case.cos + first * case.sin], dim=-1)
    return turned.to(x.dtype)


def truth(torch: Any, shape: Shape, case: Case) -> tuple[Any, ...]:
    """Output and gradients in float32, document by document and head by head, from the same rounded inputs."""
    q, k, v = (x.detach().float().requires_grad_() for x in case[:3])
    q_turned, k_turned = (rotated(torch, x, case) for x in (q, k))
    rows = []
    for row, borders in enumerate(packed_rows.document_borders(case.segments.cpu().numpy())):
        heads = []
        for head in range(shape.heads):
            key_head = head // (shape.heads // shape.kv_heads)
            parts = []
            for start, stop in itertools.pairwise(borders):
                at = slice(start, stop)
                scores = q_turned[row, at, head] @ k_turned[row, at, key_head].T * shape.size**-0.5
                seen = torch.ones_like(scores, dtype=torch.bool).tril()
                parts.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[row, at, key_head])
            heads.append(torch.cat(parts))
        rows.append(torch.stack(heads, dim=1))
    o = torch.stack(rows)
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), case.do.float()))


def run(torch: Any, attend: Attend, case: Case) -> tuple[Any, ...]:
    o = attend(*case[:3])
    return (o.detach(), *torch.autograd.grad(o, case[:3], case.do))


def times(torch: Any, attend: Attend, case: Case, wait: Callable[[Any], None]) -> dict[str, float]:
    """Seconds of the forward pass, of the backward pass alone, and of both."""
    timed = functools.partial(packed_rows.seconds_per_call, wait=wait)

    def forward() -> Any:
        with torch.no_grad():
            return attend(*case[:3])

    o = attend(*case[:3])
    return {
        "forward": timed(forward),
        "backward": timed(lambda: torch.autograd.grad(o, case[:3], case.do, retain_graph=True)),
        "both": timed(lambda: run(torch, attend, case)),
    }


def everywhere(shape: Shape, device: str) -> str | None:
    return None


def sdpa(torch: Any, shape: Shape, case: Case) -> Attend:
    """scaled_dot_product_attention, causal or with a dense mask of documents. It chooses among its kernels itself;
    those that take a mask need as many key heads as query heads.
    """
    mask, group = None, 1
    if shape.mean is not None:
        group = shape.heads // shape.kv_heads
        same = case.segments[:, :, None] == case.segments[:, None, :]
        mask = (same & torch.ones_like(same[0]).tril())[:, None]

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (rotated(torch, q, case), rotated(torch, k, case), v))
        k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return o.transpose(1, 2)

    return compiled(torch, attend, case)


def flex(torch: Any, shape: Shape, case: Case) -> Attend:
    """FlexAttention with a mask of causality and documents; it skips blocks in which nothing is visible."""
    flex_attention: Any = importlib.import_module("torch.nn.attention.flex_attention")
    segments = case.segments

    def mask(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        return (q_index >= kv_index) & (segments[b, q_index] == segments[b, kv_index])

    make_mask = compiled(torch, flex_attention.create_block_mask, case)
    block_mask = make_mask(mask, shape.rows, None, shape.length, shape.length, device=str(segments.device))

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (rotated(torch, q, case), rotated(torch, k, case), v))
        return flex_attention.flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return compiled(torch, attend, case)


def flash_why_not(module: str, shape: Shape, device: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return None if device == "cuda" else "needs a GPU"


def flash(module: str, torch: Any, shape: Shape, case: Case) -> Attend:
    """flash-attn's kernel for sequences of different lengths; each document is a sequence."""
    function = importlib.import_module(module).flash_attn_varlen_func
    borders = packed_rows.document_borders(case.segments.cpu().numpy())
    lengths = [n for row in borders for n in np.diff(row).tolist()]
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=case.q.device)
    turn = compiled(torch, lambda q, k: (rotated(torch, q, case), rotated(torch, k, case)), case)

    def attend(q: Any, k: Any, v: Any) -> Any:
        q_all, k_all, v_all = (x.flatten(0, 1) for x in (*turn(q, k), v))
        o = function(q_all, k_all, v_all, starts, starts, max(lengths), max(lengths), causal=True)
        return (o[0] if isinstance(o, tuple) else o).view(q.shape)

    return attend


def compiled(torch: Any, function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """`function`, compiled by torch.compile on a GPU."""
    return torch.compile(function, dynamic=False) if case.q.device.type == "cuda" else function


CONTENDERS = (
    Contender("PyTorch SDPA", ALL, everywhere, sdpa),
    Contender("FlexAttention, document mask", (), everywhere, flex, cpu_backward=False),
    Contender(
        "flash-attn 3, varlen", (), functools.partial(flash_why_not, "flash_attn_interface"),
        functools.partial(flash, "flash_attn_interface"),
    ),
    Contender(
        "flash-attn 2, varlen", (), functools.partial(flash_why_not, "flash_attn"),
        functools.partial(flash, "flash_attn"),
    ),
)  # fmt: skip


def measure(torch: Any, contender: Contender, shape: Shape, case: Case, want: Any, time: bool) -> dict[str, Any]:
    """The same as `measure` in `tools.bench.attention_jax`."""
    device = case.q.device.type
    if reason := contender.why_not(shape, device):
        return {"why_not": reason}
    attend = contender.make(torch, shape, case)
    if device == "cpu" and not contender.cpu_backward:
        got = (attend(*(x.detach() for x in case[:3])),)
    else:
        got = run(torch, attend, case)
    pairs = zip(GRADIENTS, got, want, strict=False)
    found = {name: packed_rows.relative_error(a.float().cpu().numpy(), b.cpu().numpy()) for name, a, b in pairs}
    result: dict[str, Any] = {"errors": found}
    if time and max(found.values()) <= BOUND:
        wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
        result["seconds"] = times(torch, attend, case, wait)
    return result


def main() -> None:
    """Reads a job as JSON from stdin and prints results as JSON lines."""
    job = json.load(sys.stdin)
    wanted = packed_rows.named(CONTENDERS, job["contenders"])
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return say_why_not(wanted, job, f"torch is not installed for {sys.executable}: pip install torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job["time"] and device == "cpu":
        return say_why_not(wanted, job, "PyTorch sees no GPU")
    # The backward pass runs many times after one forward pass, so it must not reuse that pass's buffers.
    settings: Any = importlib.import_module("torch._functorch.config")
    settings.donated_buffer = False
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(json.dumps({"device": name, "software": f"torch {torch.__version__}"}), flush=True)
    for fields in job["shapes"]:
        shape = Shape(**fields)
        case = make_case(torch, shape, device)
        want = truth(torch, shape, case)
        for contender in wanted:
            torch.compiler.reset()
            try:
                result = measure(torch, contender, shape, case, want, job["time"])
            except Exception as error:  # a failure becomes a cell of the table; the others still run
                result = {"why_not": packed_rows.failure(error)}
            print(
                json.dumps({"contender": contender.name, "masks": contender.masks, "shape": fields, **result}),
                flush=True,
            )
    return None


def say_why_not(contenders: Sequence[Contender], job: dict[str, Any], reason: str) -> None:
    for fields, contender in itertools.product(job["shapes"], contenders):
        line = {"contender": contender.name, "masks": contender.masks, "shape": fields, "why_not": reason}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
