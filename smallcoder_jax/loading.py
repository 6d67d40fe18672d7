"""Loads a trained model from a run folder or an exported folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from smallcoder_jax.base.display import one_line
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_bytes, read_json, read_json_object, reason
from smallcoder_jax.base.runtime import configure_jax
from smallcoder_jax.config import ComputeConfig, ModelConfig, from_config_dict, nearest
from smallcoder_jax.generate.chat import Reply, ReplyStream
from smallcoder_jax.generate.engine import Completion, Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.huggingface import weights
from smallcoder_jax.huggingface.read import read_export
from smallcoder_jax.models import build, lora
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.tokenizers.base import KIND_FILE, Tokenizer
from smallcoder_jax.tokenizers.chat_wire import from_wire
from smallcoder_jax.tokenizers.load import load_tokenizer, open_tokenizer
from smallcoder_jax.train import checkpoint
from smallcoder_jax.train.state import trained_params
from smallcoder_jax.train.whereabouts import read_tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model with its config, parameters and tokenizer.

    `params` are the model's own parameters in the unrolled layout. `info` is the metadata that the run or the export
    recorded. `origin` says where the model was loaded from, as JSON: `path`, `step` and `hash`. `head` holds the
    parameters of the head, for stages that train one.
    """

    model: ModelConfig
    compute: ComputeConfig
    params: Any
    tokenizer: Tokenizer
    tokenizer_folder: Path
    info: dict[str, Any]
    origin: dict[str, Any]
    head: build.Params | None = None

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model, self.compute, self.params, self.tokenizer)

    def __repr__(self) -> str:  # a notebook shows it, and the default would print all parameters
        step = "" if self.origin["step"] is None else f", step {self.origin['step']}"
        return (
            f"<model of {one_line(self.origin['path'])}{step}: {self.model.parameter_count():,} parameters, "
            f"context {self.model.context}, {self.tokenizer.vocab_size:,} tokenizer entries>"
        )

    def generate(self, prompts: str | Sequence[str], **options: Any) -> list[Completion]:
        """Completions of one prompt or several; `options` are the fields of `SamplingOptions`."""
        one = isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable)
        wanted: list[Any] = [prompts] if one else list(prompts)
        return self.generator.generate(wanted, _options(options))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> Reply:
        """The assistant's answer to `messages`: `content` and `calls`. No call is executed.

        `messages` and the schemas in `tools` have the format of OpenAI's API, and `reply.to_wire()` gives the answer in
        the same format. `options` are the fields of `SamplingOptions` except `num_samples`. Raises UserError for an
        invalid conversation, and for a model whose tokenizer has no pieces for turns.
        """
        return self.chat_stream(messages, tools=tools, **options).reply()

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> ReplyStream:
        """Like `chat`, but streamed: iterate over the pieces of the content, then call `reply()`."""
        conversation = from_wire({"messages": list(messages), "tools": list(tools or ())})
        return ReplyStream(self.generator, conversation, _options(options))


def _options(values: Mapping[str, Any]) -> SamplingOptions:
    known = [field.name for field in dataclasses.fields(SamplingOptions)]
    for name in values:
        if name not in known:
            raise UserError(f"unknown option {name}={values[name]!r:.40}; {nearest(name, known)}")
    return SamplingOptions(**values)


def load(path: Path, *, step: int | str | None = None) -> LoadedModel:
    """See `smallcoder_jax.load`."""
    configure_jax()
    if _has(path, "run.json"):
        return _from_run(RunFolder(path), step)
    if _is_export(path):
        if step is not None:
            raise UserError(f"{path} is an exported folder: it has no steps to choose from")
        return _from_export(path)
    raise _no_model(path)


def _is_export(path: Path) -> bool:
    return _has(path, weights.WEIGHTS) or _has(path, weights.INDEX)


def _has(path: Path, name: str) -> bool:
    try:
        return (path / name).exists()
    except OSError as error:  # a path that is too long, a folder without rights
        raise UserError(f"{path!s:.200} cannot be read ({reason(error)}); expected a run or an export") from error


def _no_model(path: Path) -> UserError:
    """The error for a path that is neither a run nor an export. For a path inside a run, it names the flags to use."""
    what = "is neither a run (run.json) nor an export (model.safetensors)" if path.exists() else "does not exist"
    place = path.absolute()
    for folder in place.parents:
        if (folder / "run.json").is_file():
            inside = place.relative_to(folder).parts
            advice = f"give --checkpoint {shlex.quote(str(folder))}"
            if inside[0] == "checkpoints":
                number = inside[1] if len(inside) > 1 else "STEP"
                advice += f" --step {number} (in Python: step={number!r})"
            return UserError(f"{path} {what}, but belongs to the run {folder}; {advice}")
    return UserError(f"{path} {what}; train one with python -m smallcoder_jax.main --config=configs/nano.py")


def origin(path: Path, step: int | str | None = None) -> dict[str, Any]:
    """Where a model is stored, as JSON: `path`, `step` (None for an export) and a `hash` of its files.

    Does not load the model. Raises UserError when there is no model in `path`.
    """
    if _is_export(path):
        number, digest = None, weights.digest(path)
    else:
        target = checkpoint.find_step(RunFolder(path).checkpoints, step)
        content = read_bytes(target / checkpoint.MANIFEST, "the checksums of a checkpoint")
        number, digest = int(target.name), hashlib.sha256(content).hexdigest()
    return {"path": str(path.absolute()), "step": number, "hash": digest}


def _from_run(folder: RunFolder, step: int | str | None) -> LoadedModel:
    config = from_config_dict(read_json(folder.config_json, "the config of the run"))
    target = checkpoint.find_step(folder.checkpoints, step)
    abstract = jax.eval_shape(lambda: trained_params(config))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params, meta = checkpoint.load_params(target, placed)
    run = folder.read_run_json()
    if config.lora.rank:
        base = build.to_layout(_base(folder.path, run["started_from"]), config.compute)
        params = {**lora.beside(config.lora, base), **params}
    tokenizer, tokenizer_folder = read_tokenizer(folder, meta["tokenizer_hash"])
    compute = dataclasses.replace(config.compute, layers="unroll", remat="none")
    info = {**meta, "run": run, "step_folder": str(target)}
    model, head = build.to_unrolled(build.model_params(params)), params.get("head")
    where = origin(folder.path, step)
    return LoadedModel(config.model, compute, model, tokenizer, tokenizer_folder, info, where, head)


def _base(path: Path, facts: Mapping[str, Any]) -> build.Params:
    """The unrolled parameters of the base model to which the adapters of the run in `path` belong.

    `facts` is the origin of the base model as the run recorded it. Raises UserError when it is missing or has changed.
    """
    step = "" if facts["step"] is None else f", step {facts['step']}"
    what = f"{path} holds adapters to the model in {facts['path']}{step}"
    base = find_model(path, facts["path"], facts["hash"], facts["step"], what)
    return load(base, step=facts["step"]).params


def find_model(folder: Path, recorded: str, wanted: str, step: int | None, what: str) -> Path:
    """Finds the run or export that the run in `folder` started from or learned from.

    `recorded` is its path, relative to the working folder or to `folder`, and `wanted` is the hash of its files at
    `step`. If it is not at that path, the parent of `folder` is searched too, because the runs of a chain may have been
    moved together. Raises UserError, whose message begins with `what`, when the model is missing or has changed.
    """
    advice = "bring that model back from a copy, or use an export of this run"
    reasons: dict[Path, str] = {}
    for place in _places(folder.resolve(), Path(recorded).expanduser()):
        try:
            found = origin(place, step)["hash"]
        except UserError as error:
            reasons.setdefault(place, str(error))
            continue
        if found == wanted:
            return place
        reasons[place] = f"its hash is {found}, not {wanted}"
    changed = {place: reason for place, reason in reasons.items() if reason.startswith("its hash is")}
    if changed:
        raise UserError(
            f"{what}, which has changed: {'; '.join(f'{at}: {why}' for at, why in changed.items())}; {advice}"
        )
    raise UserError(f"{what}, which is gone ({'; '.join(reasons.values())}); {advice}")


def _places(folder: Path, recorded: Path) -> list[Path]:
    """The folders in which a model recorded by a run in `folder` may be, most probable first, without duplicates."""
    ends = [Path(*recorded.parts[start:]) for start in range(len(recorded.parts))]
    siblings = [folder.parents[0] / end for end in ends if not end.is_absolute() and ".." not in end.parts]
    places = [recorded, Path(os.path.normpath(folder / recorded)), *siblings]
    return list(dict.fromkeys(place for place in places if place.is_dir())) or [places[1]]


def _from_export(path: Path) -> LoadedModel:
    model, params, tokenizer_folder = read_export(path)
    compute = ComputeConfig(dtype="float32", layers="unroll")
    info = read_json_object(path / "config.json", "the settings of an export")
    tokenizer = _exported_tokenizer(tokenizer_folder)
    return LoadedModel(model, compute, params, tokenizer, tokenizer_folder, info, origin(path))


def _exported_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer stored with an exported model, in this package's format or else in the published format."""
    published = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if published and not (folder / KIND_FILE).is_file():
        return open_tokenizer("hf", str(folder))
    return load_tokenizer(folder)
