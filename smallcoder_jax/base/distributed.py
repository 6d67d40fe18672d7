"""Several processes as one run: how they find each other, and how they agree.

What they agree on goes through jax's coordination service, which process 0 hosts: it needs no device, so that waiting
for hours (data being prepared) costs nothing. A process that falls silent for HEARTBEAT_SECONDS counts as dead, and
jax then ends all others: with SIGABRT (exit code 134), or by an error (1) where one of them was waiting for it. Whoever
started them starts all again, from the last checkpoint.
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
HEARTBEAT_SECONDS = 30  # a longer pause of the network would end a run that is well
MEETING_SECONDS = 300  # the slowest machine of a cluster starts within this
LAST_SECONDS = 60  # at the end all leave together, within this
_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000  # the service ends the wait much sooner where process 0 dies
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_NAMES = ("SMALLCODER_COORDINATOR", "SMALLCODER_PROCESSES", "SMALLCODER_PROCESS")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How a process finds the others. `coordinator`: HOST:PORT of process 0; `process`: this one, of `processes`."""

    coordinator: str
    processes: int
    process: int


def find_cluster(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> Cluster | Literal["auto"] | None:
    """Which processes belong together: by the flags, else by SMALLCODER_COORDINATOR, SMALLCODER_PROCESSES and
    SMALLCODER_PROCESS, else as a Slurm step or a TPU slice on Kubernetes says.

    None: this process is alone. AUTO: jax finds the others itself (Slurm, Open MPI, metadata of TPUs). Raises UserError
    for a combination that names no cluster.
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
    """Within the block this process is one of `cluster`; to be entered before anything asks jax for devices.

    On an error that leaves the block it prints it and ends the process at once with its exit code: the way out that
    waits for the other processes, which wait in turn for this one, would replace the code by that of an abort.
    """
    if cluster is None:
        yield
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPUs only; the others bring their own
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which the training loop answers
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
        jax.distributed.initialize(  # ends with SIGABRT where they do not come
            **where,
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LAST_SECONDS,
        )
        yield
        from_first(lambda: None)  # process 0 has the most to write at the end
        jax.distributed.shutdown()
    except BaseException as error:
        code = report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this is process 0, which does what one process should do alone."""
    import jax

    return jax.process_index() == 0


_questions = itertools.count()  # every process asks the same questions in the same order


def from_first(compute: Callable[[], Any]) -> Any:
    """What `compute` gives on process 0, the only one to run it, to every process: a JSON value.

    Returns when process 0 is done, and raises everywhere the UserError that it raised. Call it from one thread, in the
    same order on all processes.
    """
    import jax
    from jax._src import distributed  # the store of keys has no public door

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
    """Lets every process stop after the same step once one of them was asked to, at no wait.

    Each votes after every step, and the votes are added up on the devices; the sum is read with the metrics of that
    step, one step later and on all processes alike.
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
        # Both are on the devices beforehand: a step transfers nothing for them.
        self._no, self._yes = (jax.make_array_from_process_local_data(sharding, mine * vote) for vote in (0, 1))
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, wanted: bool) -> dict[str, Any]:
        """This process's vote after a step: what to add to the metrics of the step."""
        if self._alone:
            self.passed = self.passed or wanted
            return {}
        return {"stop": self._sum(self._yes if wanted else self._no)}

    def count(self, values: dict[str, float]) -> None:
        """Takes the sum of the votes out of the metrics that were read."""
        self.passed = self.passed or values.pop("stop", 0.0) > 0
