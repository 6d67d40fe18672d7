"""Counts over tokens, and the tables that show what was prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smallcoder_jax.base.display import one_line
from smallcoder_jax.data.corpus.clean import REASONS
from smallcoder_jax.data.sources.document import DOCUMENT_SPLITS
from smallcoder_jax.data.tokens.shards import Manifest

_SHOWN_PATHS = 3  # for each reason; the accounting file has more
_SHOWN = 8  # languages and licences in a table; the accounting file has all


def token_statistics(manifest_sources: Sequence[Any]) -> dict[str, Any]:
    """For each source and split, the number of tokens, and the UTF-8 bytes per token without BOS and EOS."""
    result = {}
    for source in manifest_sources:
        for name, split in source.splits.items():
            text_tokens = split.tokens - 2 * split.documents
            result.setdefault(source.spec, {})[name] = {
                "tokens": split.tokens,
                "bytes_per_token": round(split.bytes / text_tokens, 4) if text_tokens else None,
            }
    return result


def format_report(manifest: Manifest) -> str:
    """The accounting table of prepared data, followed by its statistics, as text."""
    sources = manifest.accounting["sources"]
    rows = [_accounting_row(source, entry) for source, entry in zip(sources, manifest.sources, strict=True)]
    head, *counts = zip(("source", *_COLUMNS), *rows, strict=True)  # one column per source, because there are few
    lines = [_table(head, counts)]
    for source in sources:
        lines.append("")
        lines.append(f"{source['spec']}: split by {source['split_by']}")
        lines.append("  languages: " + _most_common(source["statistics"]["languages"]))
        lines.append("  licences:  " + _most_common(source["statistics"]["licenses"]))
        marks = sorted(source["statistics"]["length_percentiles"].items(), key=lambda item: int(item[0]))
        lines.append("  bytes per document: " + ", ".join(f"p{p} {mark:,}" for p, mark in marks))
        lines += _left_out(source, manifest.accounting["left_out"].get(source["spec"], {}))
        if source["dummy"]:
            lines.append(f"  DUMMY: generated text, because the source could not be read: {source['dummy']}")
    return "\n".join(lines)


def _left_out(source: Mapping[str, Any], examples: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each reason why something was not kept, with the first paths."""
    counts = {**source["dropped"], "duplicate": source["duplicates"], "unreadable": source["unreadable"]}
    counts |= source["passed_over"]
    rows = []
    for name, count in counts.items():
        if count:
            shown = [one_line(path) for path in examples.get(name, ())[:_SHOWN_PATHS]]
            more = ["..."] * (count > len(shown) > 0)
            rows.append(f"    {name} {count:,}" + (": " + ", ".join([*shown, *more]) if shown else ""))
    return ["  not kept:", *rows] if rows else []


_SIDES = ("train", "valid.", "test")  # as in `DOCUMENT_SPLITS`
_COLUMNS = ("read", "kept", *REASONS, "duplicate", "unreadable", *_SIDES, "MB", "tokens", "bytes/token")


def _accounting_row(source: Mapping[str, Any], entry: Any) -> tuple[str, ...]:
    splits = entry.splits.values()
    tokens, size = (sum(getattr(split, name) for split in splits) for name in ("tokens", "bytes"))
    text_tokens = tokens - 2 * sum(split.documents for split in splits)
    counts = [source["read"], source["kept"], *(source["dropped"][reason] for reason in REASONS)]
    counts += [source["duplicates"], source["unreadable"]]
    counts += [source[name]["documents"] if name in source else 0 for name in DOCUMENT_SPLITS]
    ratio = f"{size / text_tokens:.2f}" if text_tokens else "-"
    return (source["spec"], *(f"{count:,}" for count in counts), f"{size / 1e6:.1f}", f"{tokens:,}", ratio)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]])

    return "\n".join([line(head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def _most_common(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name} {count:,}" for name, count in ordered[:_SHOWN])
    return shown + (f", {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")
