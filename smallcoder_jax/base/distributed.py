"""Several processes as one run: how they find each other, and how they agree.

They agree through jax's coordination service, which process 0 hosts. It needs no device, so that waiting for hours
(while data is prepared) costs nothing. A process that is silent for HEARTBEAT_SECONDS counts as dead, and jax then ends
all others: with SIGABRT (exit code 134), or with an error (exit code 1) where one of them was waiting for the dead
process. Whoever started them has to start all of them again, from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import UserError, report

AUTO: Literal["auto"] = "auto"
HEARTBEAT_SECONDS = 30  # an interruption of the network that is longer ends a healthy run
MEETING_SECONDS = 300  # how long the processes wait for the slowest machine of a cluster to start
LAST_SECONDS = 60  # how long the processes wait for each other at the end
_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000  # the service ends the wait much sooner where process 0 dies
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_NAMES = ("SMALLCODER_COORDINATOR", "SMALLCODER_PROCESSES", "SMALLCODER_PROCESS")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How a process finds the others: `coordinator` is HOST:PORT of process 0, `processes` how many there are, and
    `process` the index of this one."""

    coordinator: str
    processes: int
    process: int


def find_cluster(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> Cluster | Literal["auto"] | None:
    """Which processes form one run: as the flags say; without flags as SMALLCODER_COORDINATOR, SMALLCODER_PROCESSES and
    SMALLCODER_PROCESS say; without those as the environment of a Slurm step or of a TPU slice on Kubernetes says.

    Returns None where this process is alone, and AUTO where jax finds the others itself (Slurm, Open MPI, TPU
    metadata). Raises UserError for a combination that describes no cluster.
    """
    given: list[Any] = [coordinator, processes, process]
    names = ["--coordinator", "--processes", "--process"]
    if given == [None, None, None]:
        given, names = [environment.get(name) or None for name in _NAMES], list(_NAMES)
    if given == [AUTO, None, None]:
        return AUTO
    if given != [None, None, None]:
        return _explicit(dict(zip(names, given, strict=True)))
    if all(name in environment for name in _SLURM) and environment["SLURM_NTASKS"] != "1":
        return AUTO
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") and "TPU_WORKER_ID" in environment:
        return AUTO
    return None


def _explicit(given: Mapping[str, Any]) -> Cluster | None:
    names = list(given)
    missing = [name for name, value in given.items() if value is None]
    if missing or given[names[0]] == AUTO:
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in given.items() if value is not None)}: expected all of "
            f"{names[0]}=HOST:PORT, {names[1]}=N and {names[2]}=I, or {names[0]}={AUTO} alone"
        )
    coordinator, processes, process = given.values()
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{names[0]}={coordinator}: expected HOST:PORT, where process 0 runs and a port free there")
    try:
        processes, process = int(processes), int(process)
    except ValueError:
        raise UserError(f"{names[1]}={processes} {names[2]}={process}: expected two whole numbers") from None
    if not 0 <= process < processes:
        raise UserError(
            f"{names[1]}={processes} {names[2]}={process}: expected at least one process, numbered from 0 to one less "
            "than their number"
        )
    return Cluster(coordinator, processes, process) if processes > 1 else None


@contextlib.contextmanager
def joined(cluster: Cluster | Literal["auto"] | None) -> Iterator[None]:
    """Within the block this process is part of `cluster`. Enter it before anything asks jax for devices.

    An error that leaves the block is printed, and the process ends at once with the error's exit code. A regular exit
    would wait for the other processes, which wait for this one, and would end with the exit code of an abort.
    """
    if cluster is None:
        yield
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # CPUs only; other devices bring their own
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, which the training loop handles
    where: dict[str, Any] = {}
    if isinstance(cluster, Cluster):
        where = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.processes,
            "process_id": cluster.process,
            "cluster_detection_method": "deactivate",
        }
    others = f"{cluster.processes} processes at {cluster.coordinator}" if isinstance(cluster, Cluster) else "the others"
    say(f"waiting for {others}, at most {MEETING_SECONDS} s", sys.stderr)
    try:
        jax.distributed.initialize(  # ends the process with SIGABRT if the others do not connect
            **where,
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LAST_SECONDS,
        )
        yield
        from_first(lambda: None)  # wait for process 0, which has the most to write at the end
        jax.distributed.shutdown()
    except BaseException as error:
        code = report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this is process 0, which does whatever only one process should do."""
    import jax

    return jax.process_index() == 0


_questions = itertools.count()  # every process asks the same questions in the same order


def from_first(compute: Callable[[], Any]) -> Any:
    """Runs `compute` on process 0 only and returns its result, a JSON value, on every process.

    Returns when process 0 is done. A UserError that process 0 raises is raised on every process. Call it from one
    thread, in the same order on all processes.
    """
    import jax
    from jax._src import distributed  # the key-value store has no public interface

    if jax.process_count() == 1:
        return compute()
    client, key = distributed.global_state.client, f"smallcoder_jax/{next(_questions)}"
    assert client is not None
    if jax.process_index() == 0:
        try:
            value = compute()
        except UserError as error:
            client.key_value_set(key, json.dumps({"error": str(error)}))
            raise
        client.key_value_set(key, json.dumps({"value": value}))
        return value
    answer = json.loads(client.blocking_key_value_get(key, _WAIT_MILLISECONDS))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


class StopVote:
    """Makes every process stop after the same step once one of them was asked to, without waiting for each other.

    Every process votes after every step, and the devices sum the votes. The sum is read together with the metrics of
    that step, one step later, on all processes alike.
    """

    def __init__(self, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        self.passed = False
        self._alone = jax.process_count() == 1
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        mine = np.ones(len(sharding.addressable_devices), np.float32)
        # Both votes are placed on the devices once, so that a step transfers nothing for them.
        self._no, self._yes = (jax.make_array_from_process_local_data(sharding, mine * vote) for vote in (0, 1))
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, wanted: bool) -> dict[str, Any]:
        """This process's vote after a step, as an entry to add to the metrics of the step."""
        if self._alone:
            self.passed = self.passed or wanted
            return {}
        return {"stop": self._sum(self._yes if wanted else self._no)}

    def count(self, values: dict[str, float]) -> None:
        """Takes the sum of the votes out of the metrics that were read."""
        self.passed = self.passed or values.pop("stop", 0.0) > 0
