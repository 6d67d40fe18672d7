"""Checks whether this machine and its cluster are fit for training. Prints one line per check, and what to do.

    python -m tools.doctor
    python -m tools.doctor --hosts=node1,node2 --folder=/shared/runs
    srun python -m tools.doctor                    # the processes find each other as in a training run

It checks versions, drivers, devices, disk, host names, a matrix product on each device and a sum over all devices. It
compares the speed of the last two with the expected speed. Run it with the environment that training uses, which
launch.platforms prints. Ends with exit code 0, or with 3 if a check failed.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallcoder_jax.base import distributed
from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, run_cli

JAX_MINIMUM = (0, 10, 2)
CUDA_DRIVER = 580  # the first driver branch that runs CUDA 13, which jax[cuda13] brings
FREE_GIGABYTES = 10.0
WRITE_MEGABYTES, WRITE_FLOOR = 64, 20.0  # MB to write, and the MB/s below which saving delays training
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
MATMUL_SHARE = 0.5  # of the rate in the data sheet; a healthy device easily reaches half
LINK_SHARE = 0.25  # of the rate at which a device can send to the others of its node or slice
ROUNDS = 5


class Finding(NamedTuple):
    """The outcome of one check. `remedy`: what to do if it failed, otherwise empty."""

    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'FAILED' if self.remedy else 'ok':<7} {self.name:<14} {self.text}"
        return f"{line}. {self.remedy}" if self.remedy else line


def check_versions() -> Finding:
    """Python and the packages that training needs."""
    import jax

    python = platform.python_version()
    found = []
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            return Finding("versions", f"{package} is not installed", "Install the project: pip install -e .")
    text = f"Python {python}, {', '.join(found)}"
    version = tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:3])
    if sys.version_info < (3, 11) or version < JAX_MINIMUM:
        minimum = ".".join(map(str, JAX_MINIMUM))
        return Finding("versions", text, f"Needed are Python 3.11 and jax {minimum} or newer: make a new environment")
    return Finding("versions", text)


def check_driver(backend: str) -> Finding:
    """Whether hardware and driver match the platform that jax chose (`backend`)."""
    if NVIDIA_VERSION.exists():
        text = NVIDIA_VERSION.read_text()
        match = re.search(r"Kernel Module.*?\s(\d+)\.(\d+)", text)
        driver = f"NVIDIA driver {match[1]}.{match[2]}" if match else "an NVIDIA driver of unknown version"
        if backend != "gpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
            return Finding(
                "driver", f"{driver}, but jax runs on {backend}", "Install the GPU build: pip install -e '.[cuda]'"
            )
        if match and int(match[1]) < CUDA_DRIVER:
            return Finding("driver", driver, f"CUDA 13 needs {CUDA_DRIVER} or newer: update the driver of this machine")
        return Finding("driver", driver)
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if chips and backend != "tpu" and importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS") != "cpu":
        return Finding(
            "driver",
            f"{len(chips)} chips under /dev, but jax runs on {backend}",
            "Another process holds them (sudo lsof /dev/accel* /dev/vfio/*), or libtpu is too old for them",
        )
    if backend == "tpu":
        return Finding("driver", f"libtpu {importlib.metadata.version('libtpu')}, {len(chips)} chips under /dev")
    return Finding("driver", "no accelerator on this machine" if backend == "cpu" else f"platform {backend}")


def check_devices() -> Finding:
    """The devices that jax finds, and their memory."""
    import jax

    local = jax.local_devices()
    stats = local[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB each for arrays" if "bytes_limit" in stats else ""
    text = f"{len(local)} x {local[0].device_kind}{memory}; {len(jax.devices())} over {jax.process_count()} processes"
    if len(jax.devices()) != len(local) * jax.process_count():
        return Finding("devices", text, "Processes see different numbers of devices: compare this line on all machines")
    return Finding("devices", text)


def check_disk(folder: Path) -> Finding:
    """Free space, write speed, and the two features that a run folder needs: locks and links."""
    name = "disk"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
            block = os.urandom(1_000_000)
            started = time.monotonic()
            with (Path(place) / "file").open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for _ in range(WRITE_MEGABYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            speed = WRITE_MEGABYTES / (time.monotonic() - started)
            (Path(place) / "link").symlink_to("file")
    except OSError as error:
        return Finding(name, f"{folder}: {error}", "Name another folder with --folder, and with --workdir in training")
    text = f"{folder}: {free:.0f} GB free, {speed:.0f} MB/s written, locks and links work"
    if free < FREE_GIGABYTES:
        return Finding(name, text, f"Checkpoints want at least {FREE_GIGABYTES:.0f} GB: free some, or use another disk")
    if speed < WRITE_FLOOR:
        return Finding(name, text, f"Below {WRITE_FLOOR:.0f} MB/s saving delays training: use another disk")
    return Finding(name, text)


def check_names(hosts: Sequence[str], several: bool) -> Finding:
    """Whether the names of this machine and the others resolve to addresses that the others can reach."""
    found = []
    for host in [socket.gethostname(), *hosts]:
        try:
            address = str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
        except OSError as error:
            return Finding(
                "host names", f"{host}: {error}", f"Give {host} a name in DNS or in /etc/hosts of every machine"
            )
        if several and host in hosts and host not in ("localhost", address) and address.startswith(("127.", "::1")):
            return Finding(
                "host names",
                f"{host} is {address} here, where no other machine reaches it",
                f"Remove the line of {host} with {address} from /etc/hosts",
            )
        found.append(f"{host} {address}")
    return Finding("host names", ", ".join(found))


def check_matmul() -> list[Finding]:
    """Whether a matrix product on every device of this process is right and fast enough."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from smallcoder_jax.train.flops import peak_flops

    kind, on_cpu = jax.local_devices()[0].device_kind, jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    product = jax.jit(jnp.matmul)
    expected, source = (_numpy_rate(host), "NumPy here") if on_cpu else (peak_flops(kind), "data sheet")
    # Simulated CPU devices share the cores, and one device can use all of them.
    devices = jax.local_devices()[:1] if on_cpu else jax.local_devices()
    findings = []
    for device in devices:
        x = jax.device_put(jnp.asarray(host, dtype), device)
        seconds = _seconds(lambda x=x: product(x, x))
        rate = 2 * size**3 / seconds
        exact = np.asarray(x[:8], np.float64) @ np.asarray(x, np.float64)
        error = float(np.max(np.abs(np.asarray(product(x, x)[:8], np.float64) - exact)) / np.max(np.abs(exact)))
        name = f"matmul {device.id}"
        text = f"{rate / 1e12:.2f} TFLOP/s in {dtype.__name__}, relative error {error:.1e}"
        if error > (1e-4 if on_cpu else 1e-2):
            findings.append(Finding(name, text, f"{device} computes wrongly: take it out of use and have it replaced"))
        elif expected is None:
            findings.append(Finding(name, f"{text}; no figure is known for '{kind}' to compare with"))
        elif rate < MATMUL_SHARE * expected:
            remedy = (
                f"Expected is {MATMUL_SHARE:.0%} of {expected / 1e12:.2f} ({source}) or more: look for other programs"
            )
            findings.append(Finding(name, text, f"{remedy}, a power limit or heat on {device}"))
        else:
            findings.append(Finding(name, f"{text}: {rate / expected:.0%} of {expected / 1e12:.2f} ({source})"))
    return findings


def check_all_reduce() -> Finding:
    """Whether a sum over all devices of all processes is right and fast enough."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from smallcoder_jax.preflight.target import chip_of

    devices = jax.devices()
    count, kind = len(devices), devices[0].device_kind
    if count == 1:
        return Finding("all-reduce", "one device: nothing to sum over")
    mesh = Mesh(np.asarray(devices), ("all",))
    size = (1 << 20) if jax.default_backend() == "cpu" else (1 << 26)  # float32 numbers of each device
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    x = jax.jit(
        lambda: jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None], (count, size)), out_shardings=sharding
    )()
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    seconds = _seconds(lambda: total(x))
    rate = 2 * (count - 1) / count * size * 4 / seconds / 1e9
    text = f"{count} devices, {size * 4 / 1e6:.0f} MB each: {rate:.2f} GB/s sent by each"
    if float(total(x).addressable_data(0)[0]) != count * (count - 1) / 2:
        return Finding("all-reduce", text, "The sum is wrong: have the links between the devices checked")
    chip = chip_of(kind)
    if chip is None or (jax.process_count() > 1 and jax.default_backend() != "tpu"):
        return Finding("all-reduce", f"{text}, the sum is right; no figure is known for these links to compare with")
    link = chip.link / 1e9
    if rate < LINK_SHARE * link:
        return Finding(
            "all-reduce",
            text,
            f"Expected is {LINK_SHARE:.0%} of {link:.0f} GB/s or more: see nvidia-smi topo -m and NCCL_DEBUG=INFO for "
            "the path that it uses, or the state of the slice",
        )
    return Finding("all-reduce", f"{text}, {rate / link:.0%} of the links' rate; the sum is right")


def _seconds(work: Callable[[], Any]) -> float:
    """The least time of a few rounds, without compilation."""
    import jax

    jax.block_until_ready(work())
    times = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        jax.block_until_ready(work())
        times.append(time.monotonic() - started)
    return min(times)


def _numpy_rate(host: Any) -> float:
    return 2 * host.shape[0] ** 3 / _seconds(lambda: host @ host)


def examine(options: argparse.Namespace, cluster: Any) -> list[Finding]:
    """Runs every check, in order. A check that raises becomes a finding, since the sum over all devices needs every
    process."""
    import jax

    hosts = [host for host in options.hosts.split(",") if host]
    if isinstance(cluster, distributed.Cluster):
        hosts.append(cluster.coordinator.rpartition(":")[0].strip("[]"))
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("versions", check_versions),
        ("driver", lambda: check_driver(jax.default_backend())),
        ("devices", check_devices),
        ("disk", lambda: check_disk(options.folder)),
        ("host names", lambda: check_names(hosts, len(hosts) > 0)),
        ("matmul", check_matmul),
        ("all-reduce", check_all_reduce),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            found = check()
        except Exception as error:  # whatever a broken machine raises is a finding, too
            first = (str(error).splitlines() or [""])[0]
            found = Finding(name, f"{type(error).__name__}: {first}", "This check could not run: see its message")
        found = found if isinstance(found, list) else [found]
        where = f"{socket.gethostname()} {jax.process_index()}: " if jax.process_count() > 1 else ""
        for finding in found:
            say(f"{where}{finding}")
        findings += found
    return findings


def main(argv: list[str] | None = None) -> int | None:
    """Runs all checks and prints the findings. Raises CheckFailed if a check failed."""
    parser = ArgumentParser(
        prog="python -m tools.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where run folders will be (default: runs)")
    parser.add_argument("--hosts", default="", metavar="A,B", help="the machines of the cluster, by name")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="as in smallcoder_jax.main, like the next two")
    parser.add_argument("--processes", type=int, metavar="N")
    parser.add_argument("--process", type=int, metavar="I")
    options = parser.parse_args(argv)
    cluster = distributed.find_cluster(options.coordinator, options.processes, options.process, os.environ)
    with distributed.joined(cluster):
        findings = examine(options, cluster)
    # Outside: a process that failed would leave, and the others would lose the coordinator that they still wait for.
    failed = [finding.name for finding in findings if finding.remedy]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(findings)}: {', '.join(failed)}")
    return None


if __name__ == "__main__":
    run_cli(main)
