"""Verifies that a run holds the model that it claims to hold. Everything that can be recomputed is recomputed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object
from smallcoder_jax.config import Config, eval_rows, from_config_dict
from smallcoder_jax.data.rows import documents
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.verification import verify_shards
from smallcoder_jax.evaluate.perplexity import evaluate
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.report.run_folder import RunFolder, compare_identity
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train import checkpoint
from smallcoder_jax.train.state import trained_params
from smallcoder_jax.train.whereabouts import data_folders, find_tokens, read_tokenizer

Status = Literal["verified", "not_found", "no_checkpoint", "wrong_data", "corrupt", "error"]
# A trained model must predict held-out text better than one that gives every id the same probability.
UNTRAINED_SHARE = 0.95
# Rounding on another device changes the fourth digit of a loss; other weights change the second.
RECORDED_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a verification. `reason` says what is wrong, or what was checked. Values not computed are None."""

    run: str
    status: Status
    reason: str
    step: int | None = None
    files: int | None = None
    bits_per_byte: float | None = None
    untrained_bits_per_byte: float | None = None
    recorded_bits_per_byte: float | None = None
    loss: float | None = None
    recorded_loss: float | None = None


# (config, folder and meta.json of a checkpoint) -> its held-out loss, for stages that read no documents. Raises
# UserError when the data of the stage are not the checkpoint's.
Reevaluate = Callable[[Config, Path, dict[str, Any]], float]


def verify(run: Path, reevaluate: Reevaluate, *, batches: int | None = None, data: Path | None = None) -> Verdict:
    """Checks the newest checkpoint of the run folder `run`.

    1. Every file of it has the recorded checksum, else `corrupt`.
    2. It was not trained on stand-in text; run.json and the checkpoint have the same identity; and the tokenizer and
       the token shards, hashed again, are those it was trained on; else `wrong_data`.
    3. On the validation split, its bits per byte are finite and below 95% of those of equal probabilities for all ids,
       else `error`; and within 1% of the value that the run recorded for that step, else `corrupt`.

    `data` is the folder of the prepared data, by default `data.dir` or its recorded location relative to the run
    folder. `batches` validation batches are evaluated, by default as many as in training. With another number, the
    result is not compared with the recorded value.

    For stages that read no documents, `reevaluate` computes the held-out loss instead, on data that is prepared again
    and as many batches as in training. It is compared with the recorded loss.
    """
    folder = RunFolder(run.absolute())
    try:
        if not folder.config_json.is_file() or not folder.run_json.is_file():
            return Verdict(str(run), "not_found", f"{run} is no run folder: it lacks config.json or run.json")
        return dataclasses.replace(_verify_run(folder, reevaluate, batches, data), run=str(run))
    except _Failure as failure:
        return dataclasses.replace(failure.verdict, run=str(run))
    except (UserError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        # The files of an unverified run can contain anything.
        return Verdict(str(run), "error", f"{type(error).__name__}: {error}")


class _Failure(Exception):
    """Ends a verification with a verdict. `verify` fills in the run's name."""

    def __init__(self, status: Status, reason: str, **values: Any):
        super().__init__(reason)
        self.verdict = Verdict("", status, reason, **values)


def _verify_run(folder: RunFolder, reevaluate: Reevaluate, batches: int | None, data: Path | None) -> Verdict:
    steps = checkpoint.complete_steps(folder.checkpoints)
    if not steps:
        raise _Failure("no_checkpoint", f"no complete checkpoint under {folder.checkpoints}")
    step = steps[-1]
    target = folder.checkpoints / str(step)
    problems = checkpoint.verify_step(target)
    if problems:
        raise _Failure("corrupt", "; ".join(problems), step=step)
    meta = checkpoint.read_meta(target)
    # The checkpoint's own config, because config.json of the run is not covered by the checksums.
    config = from_config_dict(meta["config"])
    tokenizer = _verify_facts(folder, meta, step)
    places = data_folders(folder, config, folder.read_run_json()) if data is None else [data]
    found = next((place for place in places if place.is_dir()), places[0])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(found)))
    files = len(read_json_object(target / checkpoint.MANIFEST, "the checksums of a checkpoint")["files"])
    if "fingerprint" not in meta["identity"]["data"]:
        return _verify_loss(folder, reevaluate(config, target, meta), step, files)
    tokens = _verify_tokens(folder, config, meta, step)
    measured, recorded = _evaluate(folder, config, target, tokens, tokenizer, batches)
    untrained = math.log2(config.model.vocab_size) * measured["tokens"] / measured["bytes"]
    values = {
        "step": step,
        "files": files,
        "bits_per_byte": measured["bits_per_byte"],
        "untrained_bits_per_byte": untrained,
        "recorded_bits_per_byte": recorded,
    }
    found = measured["bits_per_byte"]
    if not math.isfinite(found) or found >= UNTRAINED_SHARE * untrained:
        raise _Failure(
            "error",
            f"{found:.4f} bits per byte on held-out text, where an untrained model has {untrained:.4f}; expected less "
            f"than {UNTRAINED_SHARE:.0%} of that: train it longer, or look into its metrics",
            **values,
        )
    if recorded is not None and abs(found - recorded) > RECORDED_TOLERANCE * recorded:
        raise _Failure(
            "corrupt",
            f"{found:.4f} bits per byte on held-out text, where the run recorded {recorded:.4f} for step {step}: these "
            "are not the weights that were evaluated then",
            **values,
        )
    record = "not recorded for this step" if recorded is None else f"recorded {recorded:.4f}"
    reason = f"step {step}: checksums and data hold, {found:.4f} bits per byte ({record}, untrained {untrained:.4f})"
    return Verdict("", "verified", reason, **values)


def _verify_loss(folder: RunFolder, found: float, step: int, files: int) -> Verdict:
    """Compares the recomputed loss `found` with the loss that the run recorded for the step."""
    recorded = _recorded(folder, step, "loss")
    values = {"step": step, "files": files, "loss": found, "recorded_loss": recorded}
    if not math.isfinite(found):
        raise _Failure("error", f"the held-out loss is {found}: look into the run's metrics", **values)
    if recorded is not None and abs(found - recorded) > RECORDED_TOLERANCE * max(abs(recorded), 0.1):
        raise _Failure(
            "corrupt",
            f"a held-out loss of {found:.4f}, where the run recorded {recorded:.4f} for step {step}: these are not the "
            "weights that were evaluated then",
            **values,
        )
    record = "not recorded for this step" if recorded is None else f"recorded {recorded:.4f}"
    return Verdict("", "verified", f"step {step}: checksums and data hold, loss {found:.4f} ({record})", **values)


def _recorded(folder: RunFolder, step: int, name: str) -> float | None:
    """The value of `name` in the last evaluation that the run logged at `step`."""
    _, rows = read_csv(folder.eval_log_csv)
    found = [row[name] for row in rows if row["step"] == step and name in row]
    return found[-1] if found else None


def _verify_facts(folder: RunFolder, meta: Mapping[str, Any], step: int) -> Tokenizer:
    """Checks that run.json belongs to the checkpoint. Returns the tokenizer it was trained with, hashed again."""
    run = folder.read_run_json()
    if meta["dummy_data"] or run["dummy_data"]:
        raise _Failure("wrong_data", "trained on generated stand-in text (data.allow_dummy_data)", step=step)
    if differences := compare_identity(run["identity"], meta["identity"]):
        raise _Failure("wrong_data", f"run.json is not of this checkpoint: {'; '.join(differences)}", step=step)
    try:
        return read_tokenizer(folder, meta["tokenizer_hash"])[0]
    except UserError as error:
        raise _Failure("wrong_data", str(error), step=step) from error


def _verify_tokens(folder: RunFolder, config: Config, meta: Mapping[str, Any], step: int) -> Path:
    """The folder of the token shards that the checkpoint was trained on, hashed again."""
    fingerprint = meta["identity"]["data"]["fingerprint"]
    tokens = find_tokens(folder, config, folder.read_run_json(), fingerprint)
    if tokens is None:
        raise _Failure(
            "wrong_data",
            f"no prepared data under {config.data.dir} has the fingerprint {fingerprint[:12]} that it was trained on; "
            "name the folder that holds it with --data, or prepare it again with the run's config",
            step=step,
        )
    try:
        manifest = shards.read_manifest(tokens)
    except UserError as error:
        raise _Failure("wrong_data", str(error), step=step) from error
    if manifest.dummy:
        raise _Failure("wrong_data", f"the data in {tokens} is generated stand-in text", step=step)
    try:
        verify_shards(tokens, manifest)
        found = shards.compute_fingerprint(tokens, manifest)
    except UserError as error:
        raise _Failure("wrong_data", str(error), step=step) from error
    if found != fingerprint:
        raise _Failure(
            "wrong_data",
            f"the token shards in {tokens} have the fingerprint {found[:12]}, not {fingerprint[:12]}: they were "
            "changed since training",
            step=step,
        )
    return tokens


def _evaluate(
    folder: RunFolder, config: Config, target: Path, tokens: Path, tokenizer: Tokenizer, batches: int | None
) -> tuple[dict[str, float], float | None]:
    """The checkpoint's measures on the validation split, and its recorded bits per byte on the same batches."""
    abstract = jax.eval_shape(lambda: trained_params(config))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params, _ = checkpoint.load_params(target, placed)
    compute = dataclasses.replace(config.compute, remat="none")
    measured = evaluate(
        config.model,
        compute,
        params["model"],
        documents.validation_batches(
            shards.read_manifest(tokens),
            tokens,
            tokenizer,
            sequence_length=config.train.sequence_length,
            batch_size=eval_rows(config),
            rows=range(eval_rows(config)),
            limit_batches=config.eval.batches if batches is None else batches,
        ),
    )
    if batches not in (None, config.eval.batches):
        return measured, None
    return measured, _recorded(folder, int(target.name), "bits_per_byte")
