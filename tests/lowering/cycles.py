"""What TPU's compiler says about a compiled step: estimated cycles outside kernels, and each kernel's VMEM.

A kernel is opaque to XLA's estimates, and transfers that run beside the computation (copy-start) have none.
"""

from __future__ import annotations

import re

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
LOOP = re.compile(r" while\(.*body=%([^,\s]+)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
KERNEL = re.compile(
    r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call".*?'
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"',
    re.DOTALL,
)


def outside_kernels(text: str, layers: int) -> int:
    """Estimated cycles of everything but the kernels in a step whose loops are its layers' loops."""
    entry, computation = "", ""
    cycles: dict[str, int] = {}
    loops: list[tuple[str, str]] = []
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            computation = found[2]
            entry = computation if found[1] else entry
        if found := LOOP.search(line):
            loops.append((computation, found[1]))
        cycles[computation] = cycles.get(computation, 0) + sum(int(n) for n in CYCLES.findall(line))
    if not all(place == entry for place, _ in loops):
        raise ValueError("a loop within a loop: how often it runs is not known here")
    return cycles[entry] + layers * sum(cycles[body] for _, body in loops)


def kernel_vmem(text: str) -> dict[str, float]:
    """VMEM in MiB that each kernel uses."""
    return {name: int(size) / 2**20 for name, size in KERNEL.findall(text)}
