"""The bytes that a compiled program sends between devices, determined from its HLO text.

Each collective counts as often as the loops around it run. Bytes are per device and per run of the program.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Between slices of TPUs, data is sent over the slower network by way of the hosts.
BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
# The TPU compiler splits a collective into a chain of parts: its start, the work that overlaps with it, and its end.
CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind.

    `payload` is the size in bytes of the whole arrays (gathered, or to be reduced), `sent` the bytes that one device
    sends with the ring algorithm, and `between_hosts` the least that must leave the host, per device of the host.
    """

    kind: str
    count: int
    payload: float
    sent: float
    between_hosts: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a program. Loops of unknown length count as one iteration; `unknown_loops` is their number."""

    collectives: tuple[Collective, ...]
    unknown_loops: int


class Message(NamedTuple):
    """One collective: how often it runs, its first group of devices, and the shapes and bytes of one device's input.

    If the compiler split the collective into a chain of parts, the first part represents all.
    """

    kind: str
    times: int
    group: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    operand: float


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: str
    attributes: str


def traffic(text: str, hosts: Sequence[int]) -> Traffic:
    """The traffic of a compiled program. `text` is its HLO (`compiled.as_text()`), and `hosts` is the host of each
    device in the order of the mesh.
    """
    unknown: set[str] = set()
    found: dict[str, list[Collective]] = {}
    for kind, times, group, _, operand in messages(text, len(hosts), unknown):
        costs = _costs(kind, operand, len(group), len({hosts[device] for device in group}))
        found.setdefault(kind, []).append(Collective(kind, times, *(times * cost for cost in costs)))
    return Traffic(tuple(_total(kind, found[kind]) for kind in KINDS if kind in found), len(unknown))


def messages(text: str, devices: int, unknown: set[str]) -> Iterator[Message]:
    """The collectives of a compiled program in which more than one of its `devices` takes part. Loops of unknown
    length, which count as one iteration, are added to `unknown`.
    """
    computations, entry = _parse(text)
    chains: set[str] = set()
    for name, each, times in _walk(computations, entry, 1, unknown):
        chain = CHAIN.search(each.attributes)
        if chain and chain[1] in chains:
            continue
        if chain:
            chains.add(chain[1])
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else each.op.removesuffix("-start")
        types = {other.name: other.type for other in computations[name]}
        operands = [types.get(operand, "") for operand in re.findall(r"%([\w.-]+)", each.operands)]
        shapes = (array[1] for operand in operands for array in ARRAY.findall(operand))
        group = _group(each.attributes, devices)
        if each.op == "send":
            kind, group = _between_slices(each.attributes, devices)
        if len(group) > 1:
            sizes = tuple(tuple(int(d) for d in shape.split(",") if d) for shape in shapes)
            yield Message(kind, times, tuple(group), sizes, sum(_bytes(operand) for operand in operands))


def _total(kind: str, found: list[Collective]) -> Collective:
    sums = (sum(getattr(each, field.name) for each in found) for field in dataclasses.fields(Collective)[1:])
    return Collective(kind, *sums)


def _walk(
    computations: dict[str, list[Instruction]], name: str, times: int, unknown: set[str]
) -> Iterator[tuple[str, Instruction, int]]:
    """The collectives that a computation reaches, each with its computation and how often it runs. All branches of a
    conditional count. Loops of unknown length are added to `unknown`.
    """
    for each in computations[name]:
        if each.op.removesuffix("-start") in KINDS or (each.op == "send" and BETWEEN_SLICES.search(each.attributes)):
            yield name, each, times
            continue
        rounds = times
        if each.op == "while":
            trips = _trip_count(each, computations)
            if trips is None:
                unknown.add(each.name)
            rounds = times * (1 if trips is None else trips)
        for called in _called(each.attributes):
            yield from _walk(computations, called, rounds, unknown)


def _between_slices(attributes: str, devices: int) -> tuple[str, list[int]]:
    """The kind of a transfer between slices, and a device of each that takes part. In a mesh, slices are outermost."""
    transfer, slices = BETWEEN_SLICES.search(attributes), SLICES.search(attributes)
    assert transfer is not None
    assert slices is not None
    kind = {"one-to-one": "collective-permute"}.get(word := transfer[1].lower().replace("_", "-"), word)
    ranges = ([int(end) for end in part.split(":")] for part in slices[1].split(","))
    count = sum(ends[-1] - ends[0] + 1 for ends in ranges)
    return kind, list(range(0, devices, devices // count))


def _costs(kind: str, operand: float, devices: int, hosts: int) -> tuple[float, float, float]:
    """The payload, sent and between-host bytes per device of one collective over `devices` on `hosts`."""
    payload = operand * devices if kind == "all-gather" else operand
    if kind == "collective-permute":
        return payload, operand, operand if hosts > 1 else 0.0
    passes = 2 if kind == "all-reduce" else 1
    sent = passes * payload * (devices - 1) / devices
    # Devices of a host share their data, so each has to send only a part of it to the other hosts.
    return payload, sent, passes * payload * (hosts - 1) / hosts / (devices / hosts)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = header[2]
            entry = current if header[1] else entry
            computations[current] = []
        elif " = " in line and current:
            name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
            kind, rest = _split_type(rest)
            op, _, rest = rest.partition("(")
            end = _closing("(" + rest)
            computations[current].append(Instruction(name.lstrip("%"), kind, op, rest[: end - 1], rest[end:]))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    return len(text)


def _bytes(kind: str) -> float:
    """The bytes of an array type, or of all arrays of a tuple type."""
    total = 0.0
    for name, dimensions in ARRAY.findall(kind):
        bits = re.search(r"\d+", name)
        size = 8 if name == "pred" else int(bits[0]) if bits else 0
        total += size / 8 * math.prod(int(d) for d in dimensions.split(",") if d)
    return total


def _called(attributes: str) -> list[str]:
    names = CALLED.findall(attributes)
    for branches in BRANCHES.findall(attributes):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


def _trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """The trip count as annotated by the compiler, or from a condition `counter < constant`, as JAX's scans have."""
    if known := TRIPS.search(loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    if condition is None:
        return None
    found = list(computations[condition[1]])
    for each in computations[condition[1]]:
        for called in _called(each.attributes):
            found += computations[called]
    limits = [each.operands for each in found if each.op == "constant" and each.type.startswith(("s32[]", "s64[]"))]
    compares = [each for each in found if each.op == "compare" and "direction=LT" in each.attributes]
    return int(limits[0]) if len(limits) == len(compares) == 1 else None


def _group(attributes: str, devices: int) -> list[int]:
    """The first group of devices that work together. All groups have the same size."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        moved = [pair for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1]]
        return sorted({int(device) for pair in moved for device in pair})
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(device) for device in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape = [int(size) for size in iota[2].split(",")]
        ids = np.arange(math.prod(shape)).reshape(shape)
        ids = ids.transpose([int(axis) for axis in iota[3].split(",")]) if iota[3] else ids
        return ids.reshape(-1)[: int(iota[1])].tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'(\w+)'", mesh[2])
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return ids[tuple(slice(None) if name in chosen else 0 for name in sizes)].reshape(-1).tolist()
    return list(range(devices))
