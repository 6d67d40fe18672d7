"""Trains on Kubernetes as a JobSet (jobset.x-k8s.io/v1alpha2): one pod per host, restarted together after a crash.

    python -m launch.kubernetes --dry-run --name=medium --image=IMAGE --hosts=2 --platform=gpu --devices=8 \\
        --claim=runs -- --config=configs/medium.py --workdir=/runs/medium

--dry-run prints the manifest; without it the manifest goes to `kubectl apply`. The image contains the installed project
as its working directory. The claim is a volume that all pods can write, mounted at /runs; the run folder is in it.

A pod that ends with 2 (a mistake), 3 (a failed check) or 4 (diverged) fails the JobSet permanently. After any other
failure all pods restart, at most --retries times, and continue from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from typing import Any

from launch.platforms import PLATFORMS, settings_of
from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.errors import NOT_TRIED_AGAIN

PORT = 8476
RESOURCES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"  # set on the pods of an indexed Job
GRACE_SECONDS = 300  # between SIGTERM and SIGKILL: time for the last step and its checkpoint


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet in the form that kubectl accepts."""
    pods = {
        "metadata": {"labels": {"app": options.name}},
        "spec": {
            "restartPolicy": "Never",  # podFailurePolicy requires it
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "nodeSelector": dict(options.node_selector),
            "containers": [_container(options)],
            "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}],
        },
    }
    mistakes = {"containerName": "train", "operator": "In", "values": list(NOT_TRIED_AGAIN)}
    job = {
        "completions": options.hosts,
        "parallelism": options.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one dead pod fails the Job, because its peers cannot continue without it
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistakes}]},
        "template": pods,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "namespace": options.namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {
                "maxRestarts": options.retries,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _container(options: argparse.Namespace) -> dict[str, Any]:
    settings = settings_of(options.platform, {})
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in settings.items()]
    if options.platform == "tpu":  # the slice numbers its hosts itself
        environment.append({"name": "SMALLCODER_COORDINATOR", "value": "auto"})
    else:
        environment += [
            {"name": "SMALLCODER_COORDINATOR", "value": f"{options.name}-workers-0-0.{options.name}:{PORT}"},
            {"name": "SMALLCODER_PROCESSES", "value": str(options.hosts)},
            {"name": "SMALLCODER_PROCESS", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
        ]
    limits = {RESOURCES[options.platform]: str(options.devices)} if options.platform in RESOURCES else {}
    return {
        "name": "train",
        "image": options.image,
        "command": ["python", "-m", "smallcoder_jax.main", *options.arguments],
        "env": environment,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
    }


def _selector(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text}: expected KEY=VALUE")
    return key, value


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m launch.kubernetes",
        usage="%(prog)s [options] -- ARGUMENTS OF smallcoder_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--image", required=True)
    parser.add_argument("--hosts", type=int, required=True, metavar="N")
    parser.add_argument("--platform", choices=sorted(PLATFORMS), required=True)
    parser.add_argument("--devices", type=int, default=0, metavar="D", help="GPUs or TPU chips of each host")
    parser.add_argument("--claim", required=True, help="persistent volume claim for the run folder")
    parser.add_argument(
        "--node-selector",
        type=_selector,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for a TPU slice: cloud.google.com/gke-tpu-accelerator=... and cloud.google.com/gke-tpu-topology=...",
    )
    parser.add_argument("--retries", type=int, default=3, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, and run nothing")
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.arguments = given[cut + 1 :]
    if not options.arguments:
        parser.error("-- and the arguments of smallcoder_jax.main are missing")
    # Pods are called NAME-workers-0-INDEX-XXXXX, which has to fit into a DNS label of 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
        parser.error(f"--name={options.name}: expected at most 40 lower-case letters, digits and dashes")
    if options.hosts < 1 or options.retries < 0:
        parser.error("--hosts is at least 1, and --retries not negative")
    if (options.platform in RESOURCES) != (options.devices > 0):
        parser.error("--devices is how many GPUs or TPU chips each host has; a CPU takes none")
    text = json.dumps(manifest(options), indent=2)
    if options.dry_run:
        print(text)
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text.encode(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
