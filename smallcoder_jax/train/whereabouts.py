"""Finds what a run needs in addition to its checkpoints, even if its folder has been moved.

The tokenizer and the facts about the data are stored in the run folder itself. Token shards are not, but they are
recognised by their fingerprint, wherever they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json
from smallcoder_jax.config import Config, from_config_dict
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer


def keep_tokenizer(folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Copies the tokenizer into the run folder, unless a sound copy is there. Raises UserError when reading it back
    gives another tokenizer, and OSError.
    """
    if folder.tokenizer.is_dir():
        try:
            read_tokenizer(folder, tokenizer.hash)
            return
        except UserError:  # the copy is damaged
            shutil.rmtree(folder.tokenizer)
    partial = folder.path / f".{folder.tokenizer.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(folder.tokenizer)
    read_tokenizer(folder, tokenizer.hash)


def read_tokenizer(folder: RunFolder, wanted: str) -> tuple[Tokenizer, Path]:
    """The tokenizer of a run, and the folder that it was read from. `wanted` is the hash that the run recorded.

    Raises UserError when the tokenizer is missing, damaged or another one.
    """
    path = folder.tokenizer
    advice = f"put a copy of the run's tokenizer there as {folder.tokenizer}"
    if not path.is_dir():  # older runs stored the path of their tokenizer, not the tokenizer
        recorded = folder.read_run_json().get("tokenizer_folder")
        if not isinstance(recorded, str):
            raise UserError(f"the run's tokenizer is gone: {path} does not exist; {advice}")
        path = Path(recorded)
        if not path.is_dir():
            raise UserError(f"the run's tokenizer is gone: {path}, which run.json names, does not exist; {advice}")
    tokenizer = load_tokenizer(path)
    if tokenizer.hash != wanted:
        raise UserError(
            f"the tokenizer in {path} is not the one that the run was trained with: its hash is {tokenizer.hash[:12]}, "
            f"not {wanted[:12]}; {advice}"
        )
    return tokenizer, path


def data_folders(folder: RunFolder, config: Config, run: Mapping[str, Any]) -> list[Path]:
    """The folders in which the data of a run may be: `data.dir`, and its recorded location relative to the run folder.
    `run` is the content of run.json.
    """
    found = [Path(config.data.dir).expanduser()]
    if isinstance(run.get("data_folder"), str):
        found.append(Path(os.path.normpath(folder.path.resolve() / run["data_folder"])))
    if isinstance(run.get("tokenizer_folder"), str):  # an older run that did not record its data
        found += Path(run["tokenizer_folder"]).parents[1:2]
    return found


def find_tokens(folder: RunFolder, config: Config, run: Mapping[str, Any], fingerprint: str) -> Path | None:
    """The folder of token shards whose manifest has `fingerprint`; None when it is missing."""
    for root in data_folders(folder, config, run):
        for manifest in sorted(root.glob(f"tokens/*/{shards.MANIFEST}")):
            if shards.has_fingerprint(manifest, fingerprint):
                return manifest.parent
    return None


def read_trained_tokens(folder: RunFolder, meta: Mapping[str, Any], run: Mapping[str, Any]) -> shards.Manifest | None:
    """The manifest of the token shards that a checkpoint was trained on: the run's copy, or else the one with the
    shards.

    `meta` is the meta.json of the checkpoint. None when the manifest is missing, or when no documents were read.
    """
    fingerprint = meta["identity"]["data"].get("fingerprint")
    if fingerprint is None:
        return None
    if shards.has_fingerprint(folder.tokens_json, fingerprint):
        return shards.parse_manifest(read_json(folder.tokens_json, "the manifest of a run's token shards"))
    tokens = find_tokens(folder, from_config_dict(meta["config"]), run, fingerprint)
    return shards.read_manifest(tokens) if tokens else None
