"""Trains a model in stages, exports it and verifies the runs. The stages: tokenizer, language, code, tools, reward,
dpo, ppo, grpo, distill.

    python -m tools.run_stages --variant=nano --workdir=runs/pipeline
    python -m tools.run_stages --variant=small --stages=tokenizer,language,code,tools --workdir=runs/small

Each stage starts from the model of the previous one, with a fresh optimizer. The same command continues where it
stopped. --config.KEY=VALUE sets a value in all stages; the files in configs/stages describe each stage. Ends with exit
code 3 if a stage did not improve its own measure on held-out data, or if the export does not agree with the model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import EXIT_INTERRUPTED, CheckFailed, UserError, run_cli
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.configfile import split_overrides


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m tools.run_stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", required=True, help="a file in configs/: nano, tiny, small, staged_medium, ...")
    parser.add_argument("--stages", help="comma-separated, in this order; default: all")
    parser.add_argument("--workdir", type=Path, help="default runs/stages_VARIANT")
    parser.add_argument(
        "--no-export", action="store_true", help="only verify at the end: for models that transformers does not have"
    )
    parser.add_argument("--no-check", action="store_true", help="do not fail if a stage improved nothing")
    options = parser.parse_args(arguments)
    from smallcoder_jax import pipeline
    from smallcoder_jax.base.progress import Progress
    from smallcoder_jax.base.terminal import format_table, human_time
    from smallcoder_jax.huggingface import reference

    start = time.monotonic()
    workdir = options.workdir or Path("runs") / f"stages_{options.variant}"
    stages = options.stages.split(",") if options.stages else pipeline.STAGES
    planned = pipeline.plan(options.variant, stages, workdir, overrides)
    policies = [each for each in planned if each.config.stage.kind.policy]
    if policies and not options.no_export:
        check_export(policies[-1].config.model)
        reference.check_installed()
    if "tokenizer" in stages:
        pipeline.ensure_tokenizer(planned, workdir / "tokenizer", Progress(sys.stderr))
    done = []
    for each in planned:
        say(f"\n=== stage {each.stage} ===", sys.stderr)
        result = pipeline.run_stage(each, workdir)
        if result is None:
            return EXIT_INTERRUPTED
        done.append(result)
        pipeline.write_report(workdir, options.variant, done)
    rows = [
        [stage, measure, *("-" if number is None else f"{number:.4f}" for number in change)]
        for stage, measure, change in pipeline.table_rows(done)
    ]
    say("\n" + format_table(["stage", "held-out measure", "before", "after", "standard error"], rows))
    say("\n" + format_table(["stage", "time"], [[each.stage, human_time(each.seconds)] for each in done]))
    finish([each.folder for each in policies], pipeline.runs_of(planned), export=not options.no_export)
    say(f"\nall in {human_time(time.monotonic() - start)}; report {workdir / 'stages.html'}")
    failed = [] if options.no_check else pipeline.failures(planned, done)
    if failed:
        raise CheckFailed("stages that did not reach their goal: " + "; ".join(failed))
    return 0


def check_export(model: ModelConfig) -> None:
    """Raises UserError if the model could not be exported at the end. Called before anything is trained."""
    from smallcoder_jax.models.families import published

    try:
        published(model).model_type(model)
    except UserError as error:
        raise UserError(f"{error}. To train and verify it without an export, add --no-export") from error


def finish(policies: list[Path], runs: list[Path], *, export: bool) -> None:
    """Exports the last of `policies` and checks it in transformers if `export` is set, and verifies all `runs`."""
    from tools import export as exporter
    from tools import verify_models

    if policies and export:
        say(f"\nexporting {policies[-1]}, and checking the export in transformers ...")
        exporter.main([f"--checkpoint={policies[-1]}"])
    if runs:
        verify_models.main([f"--run={run}" for run in runs])


if __name__ == "__main__":
    run_cli(main)
