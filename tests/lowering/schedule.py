"""How many instruction bundles TPU's compiler scheduled for each part of the attention kernels, from its dump.

    DUMP="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    LIBTPU_INIT_ARGS=$DUMP python -m pytest -m lowering tests/lowering/test_tpu.py -k "splash and v5e"
    python -m tests.lowering.schedule DIR

A bundle takes a cycle or more: what waits for memory or for a matrix unit is not in it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:\s*([> ]*)\{")
KERNELS = re.compile(r"\d+-(.*(?:attention_|splash_)\S*?)-\d+-final_bundles\.txt")
SMALL = 200  # bundles of a part that is not worth a line


def parts(text: str) -> list[tuple[int, int]]:
    """Loop depth (1: once per step of the grid) and bundles between borders of loops and of what is predicated."""
    found: list[tuple[int, int]] = []
    for bundle in filter(None, map(BUNDLE.match, text.splitlines())):
        depth = bundle[2].count(">")
        if found and not bundle[1] and found[-1][0] == depth:
            found[-1] = (depth, found[-1][1] + 1)
        else:
            found.append((depth, 1))
    return found


def main(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if (kernel := KERNELS.fullmatch(path.name)) and "schedule-analysis" not in path.name:
            large = [f"{bundles} at depth {depth}" for depth, bundles in parts(path.read_text()) if bundles >= SMALL]
            print(f"{kernel[1]}: {', '.join(large)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
