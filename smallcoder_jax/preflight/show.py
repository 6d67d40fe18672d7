"""Shows the report as a table."""

from __future__ import annotations

import sys

from smallcoder_jax.base.terminal import human_bytes, human_count, human_time, named_values, screen_width
from smallcoder_jax.preflight.examine import Report


def table(report: Report) -> str:
    """The report as sections of names and values, at most as wide as the terminal."""
    sections = {
        "run": _run(report),
        "memory of a device": _memory(report),
        "step, at the least": _step(report),
        "collectives of a device": _collectives(report),
        "budget, at the least": _budget(report),
    }
    longest = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = [f"{report.name} on {report.topology}: {report.devices} x {report.device_kind}"]
    for title, rows in sections.items():
        entries = [(f"  {name:<{longest}}", value) for name, value in rows]
        lines += ["", title, *named_values(entries, screen_width(sys.stdout))]
    return "\n".join(lines)


def _run(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("parameters", f"{report.parameters:,}"),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())),
        (
            "batch",
            f"{report.batch_size} rows of {report.sequence_length} tokens, {report.microbatch_size} rows at a time",
        ),
        ("attention", report.attention),
    ]
    if report.recurrence:
        rows.append(("recurrence", report.recurrence))
    if report.changes:
        rows.append(
            ("changed", "rounded up, so that rows divide over the mesh; train with " + " ".join(report.changes))
        )
    return rows


def _memory(report: Report) -> list[tuple[str, str]]:
    memory, largest = report.memory, report.largest
    refused = "unknown: the compiler refuses the step"
    most = f"{largest.rows} rows per device" if largest.rows else "not even one row per device"
    if largest.estimate is not None:
        most = f"about {largest.estimate} rows per device, by extrapolation; {largest.rows} were tried and fit"
    if largest.too_many is not None:
        most += f"; {largest.too_many} do not fit"
    return [
        ("parameters", human_bytes(memory.parameters)),
        ("optimizer", human_bytes(memory.optimizer)),
        ("gradients", human_bytes(memory.gradients)),
        ("activations, other temporaries", refused if memory.activations is None else human_bytes(memory.activations)),
        ("peak", refused if memory.peak is None else human_bytes(memory.peak)),
        ("available", f"{human_bytes(memory.available)} ({memory.available_source})"),
        ("fits", "yes" if memory.fits else "NO"),
        ("largest microbatch", f"{most} ({largest.compilations} compiled)"),
    ]


def _step(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("FLOPs per token", human_count(report.flops_per_token)),
        ("  including recomputation", human_count(report.executed_flops_per_token)),
    ]
    roofline = report.roofline
    if roofline is None:
        why = "the step does not fit" if report.traffic is None else f"no figures of {report.device_kind}"
        return [*rows, ("time", f"not estimated: {why}")]
    tokens = report.batch_size * report.sequence_length
    return [
        *rows,
        ("arithmetic", human_time(roofline.arithmetic)),
        ("memory traffic", human_time(roofline.memory)),
        ("collectives", human_time(roofline.collectives)),
        ("time", f"{human_time(roofline.step)}, {human_count(tokens / roofline.step)} tokens per second"),
        ("MFU, at most", f"{roofline.mfu:.1%}"),
        ("assumed", roofline.assumption),
        ("figures of the chip", report.chip_source or ""),
    ]


def _collectives(report: Report) -> list[tuple[str, str]]:
    if report.traffic is None:
        return [("none known", "the step does not fit")]
    rows = [
        (
            each.kind,
            f"{each.count} per step, {human_bytes(each.payload)}; sends {human_bytes(each.sent)}"
            + (f", to other hosts {human_bytes(each.between_hosts)}" if each.between_hosts else ""),
        )
        for each in report.traffic.collectives
    ]
    if report.traffic.unknown_loops:
        rows.append(("at least", f"{report.traffic.unknown_loops} loops of unknown length count as one round"))
    return rows or [("none", "one device")]


def _budget(report: Report) -> list[tuple[str, str]]:
    budget = report.budget
    if budget is None:
        return [("time", "not estimated")]
    cost = "give --price for one chip-hour" if budget.cost is None else f"{budget.cost:,.2f} at {budget.price} an hour"
    return [
        ("tokens", human_count(budget.tokens)),
        ("time", human_time(budget.hours * 3600)),
        ("chip-hours", f"{budget.chip_hours:,.1f}"),
        ("cost", cost),
    ]
