"""Writes a run as a Hugging Face folder that `transformers` loads.

    python -m tools.export --checkpoint runs/nano
    python -m tools.export --checkpoint runs/nano --step 2000 --output exported/nano --dtype bfloat16
    python -m tools.export --checkpoint runs/bytes --weights packed

Llama and GPT-2 need no remote code. A model that transformers does not have brings its code, in PyTorch, and is loaded
with trust_remote_code=True. The folder appears only after `transformers` agreed with the model in logits, token ids and
greedy text. --checkpoint may also be an exported folder, which is read and written again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import UserError, run_cli
from smallcoder_jax.config import from_config_dict
from smallcoder_jax.huggingface import card as model_card
from smallcoder_jax.huggingface import names, parity, write
from smallcoder_jax.huggingface import record as export_record

if TYPE_CHECKING:
    from smallcoder_jax.loading import LoadedModel
    from smallcoder_jax.report.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int | None:
    """Exports one model. Raises UserError if it cannot be exported, and CheckFailed if transformers disagrees."""
    args = build_parser().parse_args(argv)
    import smallcoder_jax

    loaded = smallcoder_jax.load(args.checkpoint, step=args.step)
    again = not os.path.isfile(args.checkpoint / "run.json")
    if again:
        record = export_record.read(args.checkpoint)
        card = {key: value for key, value in record.card.items() if key != "parity"}
        dtype, packing = args.dtype or record.dtype, args.weights or record.weights
    else:
        if from_config_dict(loaded.info["config"]).stage.kind.head:
            raise UserError(
                f"{args.checkpoint} is a reward model: it scores answers, and transformers has no such model"
            )
        card = run_card(args.checkpoint, loaded)
        dtype, packing = args.dtype or "float32", args.weights or "float"
    output = args.output or (args.checkpoint if again else args.checkpoint / "export")
    if packing == "packed":
        names.check_packable(loaded.model)
    params = write.stored_params(loaded.model, loaded.params, dtype, packing)

    def check(folder: Path) -> Mapping[str, Any]:
        report = parity.check(folder, loaded.model, params, loaded.tokenizer, texts=sample_texts())
        say(json.dumps(report.to_dict(), indent=1) if args.json else report.table())
        return report.record()

    write.write_export(
        output,
        model=loaded.model,
        params=params,
        tokenizer=loaded.tokenizer,
        card=card,
        dtype=dtype,
        packing=packing,
        check=None if args.skip_parity else check,
    )
    unchecked = ", not checked against transformers" if args.skip_parity else ""
    say(f"exported to {output}{unchecked}", sys.stderr)
    return None


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder or an exported folder")
    parser.add_argument("--step", default=None, help="checkpoint of a run: a step number or 'best' (default: the best)")
    parser.add_argument("--output", type=Path, help="folder to write (default: export/ in the run)")
    parser.add_argument(
        "--dtype", choices=get_args(export_record.Dtype), help="how weights are stored (default: float32)"
    )
    parser.add_argument(
        "--weights",
        choices=get_args(export_record.Weights),
        help="packed: ternary weights of two bits, a tenth of the size or less (default: float)",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON instead of a table")
    parser.add_argument(
        "--skip-parity",
        action="store_true",
        help="write without the comparison, if torch cannot be installed; the model card then says so",
    )
    return parser


def run_card(path: Path, loaded: LoadedModel) -> dict[str, Any]:
    """The content of the model card for a step of the run in `path`."""
    from smallcoder_jax.base.files import read_json
    from smallcoder_jax.report.run_folder import RunFolder

    config = from_config_dict(loaded.info["config"])
    history = RunFolder(path).metrics_history_json
    references = read_json(history, "a metrics history").get("references", {}) if history.exists() else {}
    return model_card.of_run(config, lineage(RunFolder(path), loaded.info), references)


def lineage(folder: RunFolder, meta: Mapping[str, Any]) -> list[model_card.Trained]:
    """The stages in which a checkpoint of a run was trained, the first stage first. The list goes back to a run that no
    longer exists, or to an export."""
    from smallcoder_jax.loading import find_model
    from smallcoder_jax.report.run_folder import RunFolder
    from smallcoder_jax.train import checkpoint
    from smallcoder_jax.train.whereabouts import read_trained_tokens

    run = folder.read_run_json()
    trained = model_card.Trained(meta, run["dataset"], read_trained_tokens(folder, meta, run))
    origin = run.get("started_from")
    if origin is None or origin["step"] is None:
        return [trained]
    try:
        before = RunFolder(find_model(folder.path, origin["path"], origin["hash"], origin["step"], "a start"))
    except UserError:
        return [trained]
    return [*lineage(before, checkpoint.read_meta(before.checkpoints / str(origin["step"]))), trained]


def sample_texts() -> list[str]:
    """Real code that exists on every machine."""
    return [inspect.getsource(module) for module in (argparse, json, textwrap)]


if __name__ == "__main__":
    run_cli(main)
