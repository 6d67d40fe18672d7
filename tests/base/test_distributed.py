"""Who belongs together: flags, environment, Slurm, TPU slices; and what wrong combinations are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from smallcoder_jax.base import distributed
from smallcoder_jax.base.distributed import AUTO, Cluster, find_cluster
from smallcoder_jax.base.errors import CheckFailed, UserError, report

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
NAMED = {"SMALLCODER_COORDINATOR": "h:1", "SMALLCODER_PROCESSES": "4", "SMALLCODER_PROCESS": "3"}


def test_flags_come_before_the_environment() -> None:
    assert find_cluster("a:99", 2, 1, {**NAMED, **SLURM}) == Cluster("a:99", 2, 1)
    assert find_cluster("auto", None, None, NAMED) == AUTO
    assert find_cluster("[::1]:99", 1, 0, {}) is None  # one process needs no others


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (NAMED, Cluster("h:1", 4, 3)),
        ({**NAMED, **SLURM}, Cluster("h:1", 4, 3)),
        (dict.fromkeys(NAMED, ""), None),
        (SLURM, AUTO),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}, None),  # a batch script's shell
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, AUTO),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_the_environment(environment: Mapping[str, str], expected: Any) -> None:
    assert find_cluster(None, None, None, environment) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), r"--coordinator=a:1: expected all of .* or --coordinator=auto alone"),
        ((None, 2, 0), r"--processes=2, --process=0: expected all of"),
        (("auto", 2, 0), r"expected all of"),
        (("host", 2, 0), r"--coordinator=host: expected HOST:PORT"),
        ((":80", 2, 0), r"expected HOST:PORT"),
        (("a:70000", 2, 0), r"expected HOST:PORT"),
        (("a:1", 2, 2), r"--process=2: expected at least one process, numbered from 0"),
        (("a:1", 0, 0), r"expected at least one process"),
    ],
)
def test_wrong_combinations(given: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_cluster(*given, {})


def test_wrong_environments_name_their_variables() -> None:
    with pytest.raises(UserError, match=r"SMALLCODER_PROCESSES=4: expected all of SMALLCODER_COORDINATOR=HOST:PORT"):
        find_cluster(None, None, None, {"SMALLCODER_PROCESSES": "4"})
    with pytest.raises(UserError, match=r"SMALLCODER_PROCESSES=four .*: expected two whole numbers"):
        find_cluster(None, None, None, {**NAMED, "SMALLCODER_PROCESSES": "four"})


def test_alone_nothing_is_joined_and_nothing_asked() -> None:
    with distributed.joined(None):
        assert distributed.is_first()
        assert distributed.from_first(lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(ZeroDivisionError), distributed.joined(None):
        _ = 1 / 0


def test_exit_codes_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    errors = (UserError("a"), CheckFailed("b"), KeyboardInterrupt(), ValueError("c"))
    assert [report(error) for error in errors] == [2, 3, 130, 1]
    assert capsys.readouterr().err == "error: a\ncheck failed: b\nValueError: c\n"
