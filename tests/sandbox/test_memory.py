"""The memory control group of a run: where one can be made, and what the kernel does with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smallcoder_jax.sandbox.memory import GROUP, Group, group_places, make_group
from smallcoder_jax.sandbox.run import Limits, run_python

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
V1 = "5:cpu,cpuacct:/\n4:memory:/app/a\n0::/\n"
V1_MOUNTS = (
    "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 24 0:28 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
)
V2_MOUNTS = "30 24 0:26 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def groups_of_mine(places: list[Path]) -> dict[Path, list[str]]:
    """The groups of launchers that this process started, with the processes in them; other tests have theirs."""
    found = {}
    for folder in (folder for place in places for folder in place.glob(f"{GROUP}*")):
        with contextlib.suppress(OSError):  # gone meanwhile
            status = Path(f"/proc/{folder.name.removeprefix(GROUP)}/status").read_text()
            if f"\nPPid:\t{os.getpid()}\n" in status:
                found[folder] = (folder / "cgroup.procs").read_text().split()
    return found


@pytest.mark.parametrize(
    ("root", "below"), [("/", "app/a"), ("/app", "a"), ("/app/a", "."), ("/app/b", None), ("/app/a/b", None)]
)
def test_the_place_of_version_1_is_this_process_s_own_group(root: str, below: str | None) -> None:
    point = Path("/sys/fs/cgroup/memory")
    places = group_places(V1, V1_MOUNTS.format(root=root, point=point))
    assert places == ([] if below is None else [point / below])


def test_the_place_of_version_2_is_where_memory_is_handed_on(tmp_path: Path) -> None:
    own = tmp_path / "user.slice" / "run.scope"
    own.mkdir(parents=True)
    mounts = V2_MOUNTS.format(root="/", point=tmp_path)
    cgroup = "0::/user.slice/run.scope\n"
    assert group_places(cgroup, mounts) == []
    (tmp_path / "user.slice" / "cgroup.subtree_control").write_text("cpu memory pids\n")
    assert group_places(cgroup, mounts) == [own.parent]
    assert group_places("0::/\n", mounts) == []
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    assert group_places("0::/\n", mounts) == [tmp_path]  # the root
    (tmp_path.parent / "cgroup.subtree_control").write_text("memory\n")
    assert group_places("0::/\n", mounts) == [tmp_path]  # and nothing above it
    (tmp_path.parent / "cgroup.subtree_control").unlink()
    assert group_places("0::/user.slice\n", V2_MOUNTS.format(root="/user.slice", point=tmp_path)) == [tmp_path]


def test_there_is_none_where_nothing_is_mounted_or_nothing_can_be_written(tmp_path: Path) -> None:
    assert group_places("", "") == []
    assert group_places(V1, "30 24 0:26 / / rw - ext4 /dev/vda rw\n") == []
    with pytest.raises(OSError, match="No such"):
        Group(tmp_path / "missing", 1 << 20)


@pytest.mark.parametrize("swap", [True, False])
def test_settings_of_version_2_are_written_before_anything_joins(
    swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in place of the kernel's: what is written where."""
    make = Path.mkdir
    files = {"memory.max": "max", "cgroup.procs": "", "memory.events": "oom 3\noom_kill 0\n"}
    files |= {"memory.swap.max": "max"} if swap else {}

    def kernel(folder: Path) -> None:
        make(folder)
        for name, content in files.items():
            (folder / name).write_text(content)

    old = tmp_path / f"{GROUP}999999999"  # of a launcher that is gone
    old.mkdir()
    monkeypatch.setattr(Path, "mkdir", kernel)
    group = Group(tmp_path, 5 * MIB)
    assert not old.exists()
    assert group.folder == tmp_path / f"{GROUP}{os.getpid()}"
    assert (group.folder / "memory.max").read_text() == str(5 * MIB)
    assert {path.name for path in group.folder.iterdir()} == set(files)
    assert not swap or (group.folder / "memory.swap.max").read_text() == "0"
    assert not group.killed()
    (group.folder / "memory.events").write_text("oom 3\noom_kill 1\n")
    assert group.killed()
    group.join()
    assert (group.folder / "cgroup.procs").read_text() == "0"  # 0: whoever writes it


HELD = """
import mmap, os, sys
from smallcoder_jax.sandbox.memory import make_group
group = make_group(64 << 20)
if group is None:
    print("none")
    sys.exit()
for shared, size in ((True, 200), (False, 200), (False, 20)):
    pid = os.fork()
    if pid == 0:
        group.join()
        kept = mmap.mmap(-1, size << 20, (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | mmap.MAP_ANONYMOUS)
        for page in range(0, size << 20, 4096):
            kept[page] = 1
        os._exit(0)
    print(os.waitpid(pid, 0)[1], group.killed())
group.remove()
print(group.folder.exists())
"""


def test_the_kernel_keeps_the_limit() -> None:
    """Also of shared memory, which no process shows as its own."""
    done = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, check=True)
    if not writable_places():
        assert done.stdout == "none\n"
    else:
        assert done.stdout.split() == ["9", "True", "9", "True", "0", "True", "False"]


def writable_places() -> list[Path]:
    places = group_places(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    usable = []
    for place in places:
        probe = place / f"{GROUP}{os.getpid()}"
        try:
            probe.mkdir()
        except OSError:
            continue
        probe.rmdir()
        usable.append(place)
    return usable


def test_a_run_is_in_its_group_and_takes_it_away() -> None:
    places = writable_places()
    seen: dict[Path, int] = {}
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_python, "import os, time\nos.fork()\ntime.sleep(1)", limits=Limits(wall_s=30))
        until = time.monotonic() + 10
        while not run.done() and time.monotonic() < until:
            for folder, inside in groups_of_mine(places).items():
                seen[folder] = max(seen.get(folder, 0), len(inside))
            time.sleep(0.01)
        assert run.result().ended == "finished"
    assert list(seen.values()) == ([3] if places else [])  # init, the program and its child
    assert not [folder for folder in seen if folder.exists()]


def test_a_group_that_could_be_made_is_removed() -> None:
    places = writable_places()
    group = make_group(64 * MIB)
    assert (group is None) == (not places)
    if group is not None:
        assert group.folder.is_dir()
        assert not group.killed()
        group.remove()
        assert not group.folder.exists()
