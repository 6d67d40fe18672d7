"""The preferences of a config: drawn once from their sources, divided in two, and kept as files that can be read.

`DIR/preferences/KEY/` holds `train.jsonl`, `validation.jsonl` (one pair a line, see `preferences.Preference`) and
`accounting.json`: of each side, how many pairs there are by criterion.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import write_json
from smallcoder_jax.config import PreferencesConfig
from smallcoder_jax.data import conversations, preference_calls, preference_code
from smallcoder_jax.data.conversations import VALIDATION_SHARE, side_of
from smallcoder_jax.data.corpus import read_split
from smallcoder_jax.data.preferences import (
    SIDES,
    Preference,
    prompt_words,
    read_preferences,
    separate,
    write_preferences,
)
from smallcoder_jax.data.storage import new_folder, short_key

FORMAT = 1  # raised when the same settings begin to give other files
KINDS = "code, conversations, jsonl:PATH"


@dataclasses.dataclass(frozen=True)
class PreferenceSet:
    """The pairs of both sides; `fingerprint` is a hash over them, in their order."""

    folder: Path
    train: tuple[Preference, ...]
    validation: tuple[Preference, ...]
    fingerprint: str


def parse_preference_sources(text: str) -> list[str]:
    """The sources that `preferences.sources` names. Raises UserError for one that is not known, or there twice."""
    sources = [part.strip() for part in text.split(",")]
    for source in sources:
        known = source in ("code", "conversations") or source.removeprefix("jsonl:") not in ("", source)
        if not known or sources.count(source) > 1:
            raise UserError(f"preferences.sources={text!r}: expected some of {KINDS}, each once, separated by commas")
    return sources


def ensure_preferences(preferences: PreferencesConfig, root: Path, corpus: Path | None) -> PreferenceSet:
    """The preferences of these settings, below `root`; drawn first where they are not there yet. `corpus` is the folder
    that the source `code` takes its documents from.

    Raises UserError for a file that cannot be read, for a side without pairs, and where the disk is full.
    """
    sources = parse_preference_sources(preferences.sources)
    formats = [FORMAT, preference_code.FORMAT, preference_calls.FORMAT, conversations.FORMAT]
    origins = [_identity(source, corpus) for source in sources]
    key = short_key([formats, origins, preferences.count, preferences.seed, platform.python_version()])
    folder = root / "preferences" / key
    if not folder.is_dir():
        sides = _draw(sources, preferences, corpus)
        for side in SIDES:
            if not sides[side]:
                raise UserError(
                    f"preferences.sources={preferences.sources!r} has no pairs for {side}; give more of them"
                )
        with new_folder(folder) as temporary:
            for side in SIDES:
                write_preferences(temporary / f"{side}.jsonl", sides[side])
            counts = {side: collections.Counter(pair.criteria for pair in sides[side]) for side in SIDES}
            write_json(temporary / "accounting.json", {side: dict(sorted(counts[side].items())) for side in SIDES})
    train, validation = (tuple(read_preferences(folder / f"{side}.jsonl")) for side in SIDES)
    digest = hashlib.sha256(b"".join((folder / f"{side}.jsonl").read_bytes() for side in SIDES))
    return PreferenceSet(folder, train, validation, digest.hexdigest())


def _identity(source: str, corpus: Path | None) -> str:
    """What decides the pairs of a source, beside the preferences."""
    if source == "code":
        assert corpus is not None
        return f"code|{corpus.name}"
    if source == "conversations":
        return source
    path = _path(source)
    try:
        return f"jsonl|{hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError as error:
        raise UserError(f"preferences.sources names {path}, which cannot be read: {error.strerror}") from error


def _path(source: str) -> Path:
    return Path(source.removeprefix("jsonl:")).expanduser()


def _draw(sources: Sequence[str], preferences: PreferencesConfig, corpus: Path | None) -> dict[str, list[Preference]]:
    sides: dict[str, list[Preference]] = {side: [] for side in SIDES}
    for source in sources:
        if source not in ("code", "conversations"):
            for pair in read_preferences(_path(source)):
                sides[side_of(prompt_words(pair.prompt))].append(pair)
            continue
        for side in SIDES:
            share = VALIDATION_SHARE if side == SIDES[1] else 1.0
            count = max(1, round(preferences.count * share))
            if source == "conversations":
                sides[side] += preference_calls.call_pairs(side, count=count, seed=preferences.seed)
            else:
                assert corpus is not None
                documents = read_split(corpus, side)
                sides[side] += preference_code.code_pairs(documents, count=count, seed=preferences.seed)
    return separate(sides)
