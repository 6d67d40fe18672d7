"""From nothing to a checked model that completes code, on a CPU, in minutes. `make quickstart` runs it.

Trains configs/nano.py on the source of the running Python, compares its bits per byte on all held-out files with gzip
and xz, lets it complete beginnings of these files, exports it and checks the export in transformers. The same command
continues an interrupted quick start.

Ends with exit code 3 when the model needs more bits per byte than `xz -9e` file by file, or when the export does not
agree with the model.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import printable, say
from smallcoder_jax.base.errors import EXIT_INTERRUPTED, CheckFailed, UserError, run_cli
from smallcoder_jax.config import Config
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure

if TYPE_CHECKING:
    from smallcoder_jax.evaluate.completions import Written
    from smallcoder_jax.loading import LoadedModel

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "nano.py"
WAIT_SECONDS = 1800  # for the installation that started together with the training
PROMPT = "def read_lines(path):\n    with open("


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(arguments)
    workdir = options.workdir
    again = workdir.exists()
    config = load_config(str(CONFIG), overrides)
    from smallcoder_jax.models.families import published

    published(config.model).model_type(config.model)  # raises before training if the model could not be exported
    start = time.monotonic()
    import smallcoder_jax
    from smallcoder_jax.base.terminal import format_table, human_count, human_time
    from smallcoder_jax.evaluate.completions import share
    from smallcoder_jax.huggingface import reference
    from smallcoder_jax.run import evaluate_run
    from tools import export

    if options.checker is None and not (workdir / "export").is_dir():
        reference.check_installed()
    run = smallcoder_jax.train(config, workdir)
    if run.interrupted:
        return EXIT_INTERRUPTED
    say("\nevaluating on every held-out file ...")
    result = evaluate_run(workdir, config)
    references = result["references"]
    model = smallcoder_jax.load(workdir)
    completion = model.generate(PROMPT, max_tokens=48, temperature=0.0)[0]
    say("\ncompleting beginnings of held-out files ...")
    written = complete_held_out(config, model)
    if is_checked(workdir / "export", model):
        say(f"\n{workdir / 'export'} was exported and checked in transformers before")
    else:
        say("\nexporting, and checking the export in transformers ...")
        if options.checker:
            wait_for(options.checker)
        export.main([f"--checkpoint={workdir}"])
    seconds = time.monotonic() - start
    rows = [
        ["parameters", f"{config.model.parameter_count():,}"],
        ["tokens seen", human_count(run.tokens_seen)],
        ["bits per byte, this model, file by file", f"{result['bits_per_byte']:.3f}"],
        *[[f"bits per byte, {name}", f"{value:.3f}"] for name, value in references.items()],
        [f"greedy completions that are Python without repeated lines, of {len(written)}", f"{share(written):.0%}"],
        ["export", "transformers agrees: logits, token ids, greedy text"],
        ["time", human_time(seconds)],
    ]
    say("\n" + format_table(["quick start", ""], rows))
    say_what_is_there(workdir, completion.text)
    if options.record:
        benchmarks.record("quickstart", figures(result, written, seconds, again=again))
    if result["bits_per_byte"] >= references["xz -9e"]:
        raise CheckFailed(
            f"{result['bits_per_byte']:.3f} bits per byte is not below xz -9e file by file, {references['xz -9e']:.3f}"
        )
    return 0


def build_parser() -> ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(prog="python -m tools.quickstart", description=__doc__)
    parser.add_argument("--workdir", type=Path, default="runs/quickstart", help="the run folder")
    parser.add_argument("--checker", type=Path, help="file that appears once torch and transformers are installed")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    return parser


def say_what_is_there(workdir: Path, completion: str) -> None:
    """Shows the completion of PROMPT, and which files to open and commands to type next."""
    say(f"\nprompt:\n\n{PROMPT}\n\nprompt and completion, greedy:\n\n{PROMPT}{printable(completion)}\n")
    say(f"report      {workdir / 'report.html'}\ncharts      {workdir / 'charts' / 'training_latest.png'}")
    say(f"complete    python -m tools.generate --checkpoint {shlex.quote(str(workdir))} --interactive")
    say("your code   python -m smallcoder_jax.main --config=configs/nano.py --workdir=runs/mine "
          "--config.data.sources=dir:/path/to/code")  # fmt: skip


def figures(result: dict[str, Any], written: list[Written], seconds: float, *, again: bool) -> list[Figure]:
    """The figures to record: bits per byte with the limit on which the exit code depends, the compressors, and the
    rest. `again`: the run folder existed before.
    """
    from smallcoder_jax.evaluate.completions import share

    references = result["references"]
    limit, found = references["xz -9e"], result["bits_per_byte"]
    return [
        Figure(f"time of tools.quickstart{', again' if again else ''}", seconds, "s"),
        Figure(
            "bits per byte, file by file", found, None, f"below {limit:.3f}", found < limit,
            "the limit is xz -9e",
        ),
        Figure(f"good greedy completions of {len(written)}", 100 * share(written), "%"),
        *(Figure(f"bits per byte, {name}", value) for name, value in references.items()),
    ]  # fmt: skip


def complete_held_out(config: Config, model: LoadedModel) -> list[Written]:
    """Greedy completions of the beginnings of held-out files (`evaluate.completions`)."""
    from smallcoder_jax.base.progress import Progress
    from smallcoder_jax.data.tokens.prepare import prepare
    from smallcoder_jax.evaluate.bits_per_byte import held_out_texts
    from smallcoder_jax.evaluate.completions import complete
    from smallcoder_jax.generate.engine import Generator

    prepared = prepare(config, Progress(sys.stderr))
    texts = held_out_texts(prepared.manifest, prepared.tokens_folder, prepared.tokenizer)
    generator = Generator(model.model, model.compute, model.params, model.tokenizer)
    return complete(generator, [text.decode("utf-8", "replace") for text in texts])


def is_checked(folder: Path, model: LoadedModel) -> bool:
    """Whether `folder` contains an export of exactly these weights that agreed with transformers."""
    import jax

    from smallcoder_jax import loading
    from smallcoder_jax.huggingface import record

    try:
        if "parity" not in record.read(folder).card:
            return False
        exported = loading.load(folder).params
    except UserError:  # it does not exist or is damaged, and is written again
        return False
    if jax.tree.structure(exported) != jax.tree.structure(model.params):
        return False
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, exported, model.params)))


def wait_for(stamp: Path) -> None:
    """Waits until `stamp` exists. Raises UserError with the end of `stamp`.failed if that file appears instead, or if
    neither appears within WAIT_SECONDS.
    """
    failed = stamp.with_name(stamp.name + ".failed")
    if not stamp.exists():
        say("waiting for torch and transformers to be installed ...")
    last = time.monotonic() + WAIT_SECONDS
    while not stamp.exists():
        if time.monotonic() > last:
            raise UserError(
                f"after {WAIT_SECONDS} seconds torch and transformers are still not installed; see {stamp.parent}, or "
                "install them by hand (BUILD.md), and type the same command again"
            )
        if failed.exists():
            end = failed.read_text(errors="replace").strip().splitlines()[-5:]
            raise UserError(
                "torch and transformers, which check the export, could not be installed (BUILD.md says how to do it by "
                "hand); the model is trained, and the same command continues from here:\n  " + "\n  ".join(end)
            )
        time.sleep(0.2)


if __name__ == "__main__":
    run_cli(main)
