"""launch/: what is run, what is tried again, and what is not. Nothing is trained here; tests/faults/test_launchers.py
does that."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from launch import kubernetes, local
from launch.platforms import PLATFORMS, settings_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

TRAINER = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
attempt = len((folder / "calls").read_text().splitlines())
codes = {codes!r}
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(codes[min(attempt, len(codes)) - 1])
"""


def place(folder: Path, codes: Sequence[int]) -> None:
    """Puts launch/ beside a trainer that ends with `codes`, attempt by attempt, the last one for ever."""
    package = folder / "smallcoder_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(TRAINER.format(folder=str(folder), codes=list(codes)))
    (folder / "launch").symlink_to(ROOT / "launch")


# Of whoever runs the tests: `make PYTHON=... test`, for example, hands its variable on.
READ_BY_SCRIPTS = ("PYTHONPATH", "XLA_FLAGS", "PYTHON", "FOLDER", "PLATFORM", "RETRIES")


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key not in READ_BY_SCRIPTS}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env={**clean, **environment}, text=True, **pipes)


def run_local(folder: Path, codes: Sequence[int], *options: str) -> tuple[int, list[list[str]]]:
    """The launcher's exit code, and the arguments of every process that it started."""
    place(folder, codes)
    process = start(folder, sys.executable, "-m", "launch.local", *options, "--", "--config=c x.py")
    process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 130])
def test_an_end_that_a_second_attempt_would_not_change(code: int, tmp_path: Path) -> None:
    assert run_local(tmp_path, [code]) == (code, [["--config=c x.py"]])


@pytest.mark.parametrize("code", [1, 75, 134, 137])
def test_a_crash_or_an_interruption_is_tried_again(code: int, tmp_path: Path) -> None:
    assert run_local(tmp_path, [code, 0]) == (0, [["--config=c x.py"]] * 2)


def test_crashes_are_tried_again_as_often_as_asked(tmp_path: Path) -> None:
    code, calls = run_local(tmp_path, [1], "--retries=2")
    assert (code, len(calls)) == (1, 3)


def test_sigterm_is_passed_on_and_ends_the_attempts(tmp_path: Path) -> None:
    place(tmp_path, [0])
    process = start(tmp_path, sys.executable, "-m", "launch.local", "--processes=2", "--", "--wait")
    while not (tmp_path / "calls").exists() or len((tmp_path / "calls").read_text().splitlines()) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("first", "second", "expected"), [("exit 2", "sleep 60", 2), ("kill -9 $$", "exit 3", 3)])
def test_the_end_of_one_process_ends_all(
    first: str, second: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(local, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(
        local, "commands", lambda *_: [local.Command({}, ["sh", "-c", script]) for script in (first, second)]
    )
    started = time.monotonic()
    assert local.main(["--processes=2", "--retries=0", "--", "x"]) == expected
    assert time.monotonic() - started < 20


def dry_run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert local.main([*arguments, "--dry-run", "--", "--config=a b"]) == 0
    return capsys.readouterr().out.splitlines()


def test_what_a_dry_run_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    trainer = f"{sys.executable} -m smallcoder_jax.main '--config=a b'"
    assert dry_run([], capsys) == [f"JAX_PLATFORMS=cpu GLIBC_TUNABLES=glibc.malloc.hugetlb=1 {trainer}"]
    first, second = dry_run(["--processes=2", "--devices=3"], capsys)
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=3 " in first
    where = first.split("--coordinator=")[1].split()[0]
    assert first.endswith(f"{trainer} --coordinator={where} --processes=2 --process=0")
    assert second.endswith(f"{trainer} --coordinator={where} --processes=2 --process=1")
    gpus = dry_run(["--platform=gpu", "--processes=2", "--devices=4"], capsys)
    assert ["CUDA_VISIBLE_DEVICES=0,1,2,3 " in gpus[0], "CUDA_VISIBLE_DEVICES=4,5,6,7 " in gpus[1]] == [True, True]
    assert all("--xla_gpu_enable_latency_hiding_scheduler=true " in line for line in gpus)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--processes=0", "--", "x"],
        ["--retries=1"],
        ["--platform=gpu", "--processes=2", "--", "x"],
        ["--platform=tpu", "--processes=2", "--", "x"],
        ["--process=1", "--", "x"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        local.main(wrong)
    assert refused.value.code == 2
    assert "launch.local: error: " in capsys.readouterr().err


def test_settings_leave_what_is_set() -> None:
    assert settings_of("tpu", {"JAX_PLATFORMS": "cpu"}) == {}
    assert all(setting.reason for platform in PLATFORMS.values() for setting in platform)


def test_flags_exist_in_this_jaxlib() -> None:
    """XLA stops at a flag that it does not know, whatever the platform."""

    def starts(flags: str) -> bool:
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False).returncode == 0

    for platform in PLATFORMS:
        flags = settings_of(platform, {}).get("XLA_FLAGS")
        assert flags is None or starts(flags)
    assert not starts("--xla_gpu_no_such_flag=true")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([checker, script], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_the_usage_is_shown(script: Path) -> None:
    process = start(ROOT, "bash", str(script))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.startswith("Trains on ")
    assert "--dry-run" in output


def test_tpu_vm_dry_run_keeps_words_whole() -> None:
    process = start(ROOT, "bash", "launch/tpu_vm.sh", "--dry-run", "v5e", "us-a1", "--workdir=a b", FOLDER="my code")
    printed, _ = process.communicate(timeout=60)
    (command,) = [line for line in printed.splitlines() if line]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    *front, remote = words.stdout.splitlines()
    assert " ".join(front) == "gcloud compute tpus tpu-vm ssh v5e --zone=us-a1 --worker=all"
    assert remote == (
        r"--command=cd my\ code && python3 -m launch.local --platform=tpu --retries=3 --pause=60 -- "
        r"--coordinator=auto --workdir=a\ b"
    )


SRUN = '#!/bin/sh\necho "$@" >> srun.log\nexit "$(sed -n "$(wc -l < srun.log)p" codes)"\n'


@pytest.mark.parametrize(
    ("codes", "expected", "attempts", "requeued"),
    [
        ([0], 0, 1, False),
        ([2], 2, 1, False),
        ([3], 3, 1, False),
        ([4], 4, 1, False),
        ([75], 75, 1, True),
        ([134, 0], 0, 2, False),
        ([1, 137, 75], 75, 3, True),
        ([1, 1, 1], 1, 3, False),
    ],
)
def test_slurm_script(codes: list[int], expected: int, attempts: int, requeued: bool, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" > scontrol.log\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    place(tmp_path, [0])
    process = start(
        tmp_path,
        "bash",
        str(ROOT / "launch" / "slurm.sh"),
        "--config=c",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=sys.executable,
        RETRIES="2",
        SLURM_JOB_ID="17",
    )
    process.communicate(timeout=60)
    calls = (tmp_path / "srun.log").read_text().splitlines()
    assert (process.returncode, len(calls)) == (expected, attempts)
    assert calls[0] == f"--kill-on-bad-exit=0 --wait=120 {sys.executable} -m smallcoder_jax.main --config=c"
    assert (tmp_path / "scontrol.log").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"


def closed(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object of these fields and no others."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def array(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, COUNT, NAME = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "string", "maxLength": 63}
STRINGS = {"type": "object", "additionalProperties": TEXT}
VALUE_FROM = closed({"fieldRef": closed({"fieldPath": TEXT})})
CONTAINER = closed(
    {
        "name": NAME,
        "image": TEXT,
        "command": array(TEXT),
        "env": array(closed({"name": {"pattern": "^[A-Z_]+$", **TEXT}}, {"value": TEXT, "valueFrom": VALUE_FROM})),
        "ports": array(closed({"containerPort": COUNT})),
        "resources": closed({"limits": STRINGS}),
        "volumeMounts": array(closed({"name": NAME, "mountPath": TEXT})),
    }
)
POD = closed(
    {
        "restartPolicy": {"const": "Never"},  # batch/v1: what a podFailurePolicy allows
        "terminationGracePeriodSeconds": COUNT,
        "nodeSelector": STRINGS,
        "containers": array(CONTAINER),
        "volumes": array(closed({"name": NAME, "persistentVolumeClaim": closed({"claimName": TEXT})})),
    }
)
FAILURE_RULE = closed(
    {
        "action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
        "onExitCodes": closed(
            {"containerName": NAME, "operator": {"enum": ["In", "NotIn"]}, "values": array({"type": "integer"})}
        ),
    }
)
JOB = closed(
    {
        "completions": COUNT,
        "parallelism": COUNT,
        "completionMode": {"enum": ["Indexed", "NonIndexed"]},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "podFailurePolicy": closed({"rules": array(FAILURE_RULE)}),
        "template": closed({"metadata": closed({"labels": STRINGS}), "spec": POD}),
    }
)
SET_RULE = closed(
    {
        "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", **TEXT},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
        "onJobFailureReasons": array(
            {
                "enum": [
                    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"),
                    "PodFailurePolicy",
                ]
            }
        ),
    }
)
# The fields of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that are used here, with their types; no others.
JOBSET = closed(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": closed({"name": NAME, "namespace": NAME}),
        "spec": closed(
            {
                "network": closed({"enableDNSHostnames": {"type": "boolean"}, "subdomain": NAME}),
                "failurePolicy": closed({"maxRestarts": {"type": "integer", "minimum": 0}, "rules": array(SET_RULE)}),
                "replicatedJobs": array(closed({"name": NAME, "replicas": COUNT, "template": closed({"spec": JOB})})),
            }
        ),
    }
)


def manifest_of(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    common = ["--dry-run", "--name=run", "--image=i:1", "--hosts=3", "--claim=disk"]
    assert kubernetes.main([*common, *options, "--", "--config=c", "--workdir=/runs/a"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("options", [["--platform=cpu"], ["--platform=gpu", "--devices=8"]])
def test_a_jobset_passes_its_schema_and_names_the_cluster(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = manifest_of(capsys, *options)
    jsonschema.validate(made, JOBSET)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["SMALLCODER_COORDINATOR"] == "run-workers-0-0.run:8476"
    assert values["SMALLCODER_PROCESSES"] == "3" == str(job["completions"])
    assert container["command"][2:] == ["smallcoder_jax.main", "--config=c", "--workdir=/runs/a"]
    assert made["spec"]["replicatedJobs"][0]["name"] == "workers"  # the coordinator's name is made of these
    assert container["resources"]["limits"] == ({} if "--platform=cpu" in options else {"nvidia.com/gpu": "8"})
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4]


def test_a_jobset_of_tpus_leaves_the_numbers_to_the_slice(capsys: pytest.CaptureFixture[str]) -> None:
    made = manifest_of(capsys, "--platform=tpu", "--devices=4", "--node-selector=cloud.google.com/gke-tpu-topology=4x4")
    jsonschema.validate(made, JOBSET)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    names = [entry["name"] for entry in pod["containers"][0]["env"]]
    assert names == ["JAX_PLATFORMS", "SMALLCODER_COORDINATOR"]
    assert pod["containers"][0]["env"][1]["value"] == "auto"
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "4x4"}


def test_the_schema_refuses_what_kubernetes_would(capsys: pytest.CaptureFixture[str]) -> None:
    good = manifest_of(capsys, "--platform=cpu")
    for change in ({"kind": "Job"}, {"specs": {}}, {"metadata": {"name": "a" * 64, "namespace": "default"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **change}, JOBSET)


@pytest.mark.parametrize(
    "wrong", [["--name=Upper"], ["--hosts=0"], ["--platform=gpu"], ["--platform=cpu", "--devices=1"]]
)
def test_wrong_jobsets_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base = {"--name": "a", "--image": "i", "--hosts": "1", "--platform": "cpu", "--claim": "c"}
    given = {**base, **dict(option.split("=") for option in wrong)}
    with pytest.raises(SystemExit):
        kubernetes.main([*itertools.starmap("{}={}".format, given.items()), "--dry-run", "--", "x"])
    assert "launch.kubernetes: error: " in capsys.readouterr().err
