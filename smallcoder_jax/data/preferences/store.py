"""The preferences of a config: made once from their sources, split in two, and stored as readable files.

`DIR/preferences/KEY/` holds `train.jsonl` and `validation.jsonl` (one pair per line, see `pair.Preference`), and
`accounting.json` with these keys: for each side, the number of pairs by criterion; `left_out`, the number of duplicates
and of pairs whose prompt belongs to the other side; `unusable`, for each file, the number of rows that gave no pair and
the first of them; and `files` and `fingerprint`, by which a change of the two files is detected.
"""

from __future__ import annotations

import collections
import dataclasses
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from smallcoder_jax.base.artifacts import check_sealed, new_folder, sealed, short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object, write_json
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import PreferencesConfig
from smallcoder_jax.data.conversations import generate
from smallcoder_jax.data.conversations.record import VALIDATION_SHARE, side_of
from smallcoder_jax.data.corpus.corpus import read_split
from smallcoder_jax.data.preferences import calls, code, given
from smallcoder_jax.data.preferences.pair import (
    Preference,
    prompt_words,
    read_preferences,
    separate,
    write_preferences,
)
from smallcoder_jax.data.sources.cells import Account, valid_text
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.data.sources.row_files import RowFiles, find_files
from smallcoder_jax.data.sources.spec import parse_sources

FORMAT = 3  # increased whenever the same settings start to give other files
KINDS = "code, conversations, jsonl:PATH"
_ACCOUNTING = "accounting.json"
_FILES = tuple(f"{side}.jsonl" for side in SPLITS)
_DRAWN = ("code", "conversations")  # sources that are generated here; all others are files


@dataclasses.dataclass(frozen=True)
class PreferenceSet:
    """The pairs of both sides. `fingerprint` is a hash over them, in order."""

    folder: Path
    train: tuple[Preference, ...]
    validation: tuple[Preference, ...]
    fingerprint: str


def parse_preference_sources(text: str) -> list[str]:
    """The sources that `preferences.sources` names. Raises UserError for an unknown or repeated source."""
    sources = [part.strip() for part in text.split(",")]
    for source in sources:
        known = source in _DRAWN or source.removeprefix("jsonl:") not in ("", source)
        if not known or sources.count(source) > 1:
            raise UserError(f"preferences.sources={text!r}: expected some of {KINDS}, each once, separated by commas")
    return sources


def ensure_preferences(
    preferences: PreferencesConfig, root: Path, corpus: Path | None, progress: Progress | None = None
) -> PreferenceSet:
    """The preferences of these settings, which are stored below `root` and made first where they do not exist yet.
    `corpus` is the folder of the corpus whose documents the source `code` uses.

    Raises UserError for a file that cannot be read or has no usable row, for a side without pairs, and for a full disk.
    """
    sources = parse_preference_sources(preferences.sources)
    files = {source: _files(source) for source in sources if source not in _DRAWN}
    formats = [FORMAT, code.FORMAT, calls.FORMAT, generate.FORMAT]
    origins = [files[source].hash() if source in files else _identity(source, corpus) for source in sources]
    key = short_key([formats, origins, preferences.count, preferences.seed, platform.python_version()])
    folder = root / "preferences" / key
    if not folder.is_dir():
        accounts = {source: Account(f"preferences {source}", given.EXPECTED) for source in files}
        drawn = _draw(sources, preferences, corpus, files, accounts)
        for source in files:
            _say(progress, files[source].note, accounts[source].line())
        sides = separate(drawn)
        for side in SPLITS:
            if not sides[side]:
                raise UserError(
                    f"preferences.sources={preferences.sources!r} has no pairs for {side}; give more of them"
                )
        with new_folder(folder) as temporary:
            for side in SPLITS:
                write_preferences(temporary / f"{side}.jsonl", sides[side])
            counts = {side: collections.Counter(pair.criteria for pair in sides[side]) for side in SPLITS}
            accounting: dict[str, object] = {side: dict(sorted(counts[side].items())) for side in SPLITS}
            accounting["left_out"] = sum(len(drawn[side]) - len(sides[side]) for side in SPLITS)
            accounting["unusable"] = {name: {"rows": a.bad, "first": a.named} for name, a in accounts.items()}
            write_json(temporary / _ACCOUNTING, {**accounting, **sealed(temporary, _FILES)})
    return _open(folder)


def _open(folder: Path) -> PreferenceSet:
    """The preferences that are stored in `folder`. Raises UserError where the files have changed since."""
    facts = read_json_object(folder / _ACCOUNTING, f"the account of preferences; delete {folder}")
    check_sealed(folder, facts, _FILES, "preferences")
    train, validation = (tuple(read_preferences(folder / name)) for name in _FILES)
    return PreferenceSet(folder, train, validation, facts["fingerprint"])


def _identity(source: str, corpus: Path | None) -> str:
    """A text that, together with the settings, determines the pairs of a source that is not a file."""
    if source == "code":
        assert corpus is not None
        return f"code|{corpus.name}"
    return source


def _files(source: str) -> RowFiles:
    (spec,) = parse_sources(source)
    options = dict(spec.options)
    if spec.weight != 1.0 or not spec.fim or "column" in options:
        raise UserError(f"preferences.sources: {source!r} takes split as its only option, and no weight or mark")
    return find_files(source, spec.kind, spec.location, options.get("split"))


def _say(progress: Progress | None, *lines: str) -> None:
    for line in filter(None, lines):
        if progress:
            progress.note(line)


def _draw(
    sources: Sequence[str],
    preferences: PreferencesConfig,
    corpus: Path | None,
    files: dict[str, RowFiles],
    accounts: dict[str, Account],
) -> dict[str, list[Preference]]:
    sides: dict[str, list[Preference]] = {side: [] for side in SPLITS}
    for source in sources:
        if source in files:
            for pair in _given(source, files[source], accounts[source]):
                sides[side_of(prompt_words(pair.prompt))].append(pair)
            continue
        for side in SPLITS:
            share = VALIDATION_SHARE if side == SPLITS[1] else 1.0
            count = max(1, round(preferences.count * share))
            if source == "conversations":
                sides[side] += calls.call_pairs(side, count=count, seed=preferences.seed)
            else:
                assert corpus is not None
                documents = read_split(corpus, side)
                sides[side] += code.code_pairs(documents, count=count, seed=preferences.seed)
    return sides


def _given(source: str, files: RowFiles, account: Account) -> Iterator[Preference]:
    """The pair of each usable row. The account counts the other rows. Raises UserError where no row is usable."""
    for row in files.rows(given.WANTED):
        try:
            if row.problem:
                raise ValueError(row.problem)
            pair = given.preference_of(row.columns, {"source": valid_text(source), "row": row.place})
        except (UserError, ValueError) as error:
            account.add_bad(row, str(error))
            continue
        account.add_used()
        yield pair
    account.check()
