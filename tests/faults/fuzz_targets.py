"""What `tests.faults.fuzz` damages: small files of every kind that a command reads, and the readers."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

from smallcoder_jax.config import Config, DataConfig, TokenizerConfig, default_config, to_dict
from tests.faults.fuzz import ODD_VALUES, Target
from tests.helpers import tiny_config, tiny_model

CODE = "def f(x):\n    return x + 1\n\n\nclass A:\n    '''Ä'''\n\n    def g(self):\n        return f(2)\n"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def configs(folder: Path) -> Target:
    """A JSON config, and overrides of it."""
    from smallcoder_jax.configfile import load_config

    file = folder / "config.json"
    file.write_text(json.dumps(to_dict(Config())))
    sections = default_config()
    keys = [f"{name}.{key}" for name, section in sections.items() if hasattr(section, "keys") for key in section]
    texts = [
        *map(str, ODD_VALUES),
        "1e5",
        "0x10",
        "()",
        "('a',)",
        "__import__('os')",
        "1:2",
        "stdlib@1,,",
        "-1",
        "9" * 99,
    ]

    def read(rng: random.Random) -> object:
        overrides = [f"--config.{rng.choice(keys)}={rng.choice(texts)}" for _ in range(rng.randrange(3))]
        return load_config(str(file), overrides)

    return Target(folder, [file], read)


def sources(folder: Path) -> Target:
    """A tree of files, read as the source `dir:`."""
    from smallcoder_jax.data.corpus.collect import collect_source
    from smallcoder_jax.data.sources.spec import parse_sources, source_identity

    tree = folder / "tree"
    for name in ("a.py", "b.py", "pkg/c.py", "pkg/d.js", "e.md", "LICENSE", "pkg/.gitignore", "script", "data.json"):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env python\n# {name}\n{CODE}")
    cells = [{"cell_type": "code", "metadata": {}, "outputs": [], "source": CODE.splitlines(True)}] * 2
    notebook = {"cells": cells, "metadata": {"kernelspec": {"language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    (tree / "n.ipynb").write_text(json.dumps(notebook))
    (tree / "u.py").write_bytes(("# utf-16\n" + CODE).encode("utf-16"))
    (tree / "l.py").write_bytes(("# -*- coding: latin-1 -*-\n# Ä\n" + CODE).encode("latin-1"))
    (spec,) = parse_sources(f"dir:{tree}")
    data = DataConfig(sources=spec.text, dir=str(folder / "data"))

    def read(rng: random.Random) -> object:
        source_identity(spec, folder / "data")
        return collect_source(spec, data, folder / "spool", set(), None)

    return Target(folder, _files(tree), read)


def rows(folder: Path) -> Target:
    """Files of rows: documents, conversations and preferences."""
    import pyarrow
    import pyarrow.parquet

    from smallcoder_jax.config import PreferencesConfig
    from smallcoder_jax.data.conversations.given import prepare_dialogs
    from smallcoder_jax.data.corpus.collect import collect_source
    from smallcoder_jax.data.preferences.store import ensure_preferences
    from smallcoder_jax.data.sources.spec import parse_sources

    documents = [{"content": f"# {i}\n{CODE}", "path": f"{i}.py", "license": ["mit"], "n": i} for i in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in documents)
    (folder / "rows.jsonl").write_text(text)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "rows.json").write_text(json.dumps(documents))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), folder / "rows.parquet")
    asked = [{"instruction": f"What is {i}?", "input": "", "output": f"    {i}\n"} for i in range(40)]
    talks = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(40)
    ]
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(40)]
    for name, lines in (("asked", asked), ("talks", talks), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read(rng: random.Random) -> object:
        problem = None
        for name in ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"):
            kind = "parquet" if name.endswith("parquet") else "jsonl"
            (spec,) = parse_sources(f"{kind}:{folder / name}")
            problem = (
                _message(lambda spec=spec: collect_source(spec, DataConfig(), folder / "spool", set(), None)) or problem
            )
        made = folder / f"made-{rng.random()}"
        for name in ("asked", "talks"):
            problem = _message(lambda name=name: prepare_dialogs(made, f"jsonl:{folder / name}.jsonl", 0)) or problem
        pairs = PreferencesConfig(sources=f"jsonl:{folder / 'pairs.jsonl'}")
        problem = _message(lambda: ensure_preferences(pairs, made, None)) or problem
        if problem is not None:
            raise problem
        return None

    return Target(folder, _files(folder), read)


def _message(read: object) -> Exception | None:
    """The UserError that reading ends with: the other readers of a case are tried all the same."""
    from smallcoder_jax.base.errors import UserError

    try:
        read()  # pyright: ignore[reportCallIssue]
    except UserError as error:
        return error
    return None


def _tiny_run(folder: Path) -> Config:
    """Prepared data below `data` and a run in `run`, of a model over bytes."""
    import dataclasses

    from smallcoder_jax.config import CheckpointConfig, LogConfig
    from smallcoder_jax.run import train

    code = folder / "code"
    code.mkdir()
    for index in range(40):
        (code / f"{index}.py").write_text(f"# {index}\n{CODE}" * 3)
    base = tiny_config()
    config = dataclasses.replace(
        base,
        model=tiny_model(vocab_size=256),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(sources=f"dir:{code}", dir=str(folder / "data"), validation_fraction=0.2),
        train=dataclasses.replace(base.train, steps=4),
        eval=dataclasses.replace(base.eval, every=2, batches=1, sample_tokens=4),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(tensorboard=False, charts_every=0),
    )
    train(config, folder / "run")
    return config


def runs(folder: Path) -> Target:
    """The records of a run and of its newest checkpoint."""
    from smallcoder_jax import loading
    from smallcoder_jax.report.log_files import LogFiles
    from smallcoder_jax.report.page import write_report
    from smallcoder_jax.report.run_folder import RunFolder
    from smallcoder_jax.train import checkpoint

    _tiny_run(folder)
    run = RunFolder(folder / "run")
    readers = (
        lambda: write_report(run, {}, {}),
        lambda: LogFiles(run, 4, 4).close(),
        lambda: checkpoint.verify_step(run.checkpoints / "4"),
        lambda: loading.origin(run.path),
        lambda: repr(loading.load(run.path)),
        lambda: repr(loading.load(run.path, step="best")),
    )

    def read(rng: random.Random) -> object:
        return rng.choice(readers)()

    kept = {".json", ".jsonl", ".csv", ".model"}
    files = [path for path in _files(run.path) if path.suffix in kept and "state" not in path.parts]
    return Target(folder, files, read)


def tokens(folder: Path) -> Target:
    """Prepared data: accounting, tokenizer, manifest and token shards."""
    from smallcoder_jax.data.tokens.prepare import find_prepared
    from smallcoder_jax.data.tokens.validate import validate
    from smallcoder_jax.evaluate.bits_per_byte import held_out_references

    config = _tiny_run(folder)

    def read(rng: random.Random) -> object:
        prepared = find_prepared(config)
        return [held_out_references, lambda prepared: validate(prepared, 1.0, print)][rng.randrange(2)](prepared)

    return Target(folder, [path for path in _files(folder / "data") if path.suffix != ".py"], read)


def stores(folder: Path) -> Target:
    """What stages keep below `data.dir`: conversations, preferences, a teacher's tokens."""
    import numpy as np

    from smallcoder_jax.base.progress import Progress
    from smallcoder_jax.config import PreferencesConfig
    from smallcoder_jax.data.conversations.given import prepare_dialogs
    from smallcoder_jax.data.preferences.store import ensure_preferences
    from smallcoder_jax.stages.shared.teacher_tokens import KeptTokens

    given, data = folder / "given", folder / "data"
    given.mkdir()
    asked = [{"instruction": f"What is {i}?", "input": "", "output": f"    {i}\n"} for i in range(40)]
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(40)]
    for name, lines in (("asked", asked), ("pairs", pairs)):
        (given / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = KeptTokens(data / "teachers", rows=2, length=8, count=3)
    part = {"ids": np.zeros((2, 8, 3), np.uint16), "log_probs": np.zeros((2, 8, 3), np.float32)}
    kept.make([{}] * 4, lambda _: part, Progress(io.StringIO()))

    def dialogs() -> object:
        made = prepare_dialogs(data, f"jsonl:{given}/asked.jsonl", 0)
        return [made.read(side) for side in ("train", "validation")]

    preferences = PreferencesConfig(sources=f"jsonl:{given}/pairs.jsonl")
    readers = {
        "dialogs": dialogs,
        "preferences": lambda: ensure_preferences(preferences, data, None),
        "teachers": lambda: list(kept.read()),
    }
    for reader in readers.values():
        reader()

    def read(rng: random.Random) -> object:
        problem = None
        for reader in readers.values():
            problem = _message(reader) or problem
        if problem is not None:
            raise problem
        return None

    return Target(folder, _files(data), read)


def exports(folder: Path) -> Target:
    """An exported model with its tokenizer."""
    from smallcoder_jax import loading
    from smallcoder_jax.huggingface import record
    from smallcoder_jax.huggingface.write import write_export
    from tests.huggingface.conftest import CODE as TEXT
    from tests.huggingface.conftest import llama, random_params, train_sentencepiece

    model = llama()
    tokenizer = train_sentencepiece([TEXT] * 4, 420, 100_000)
    card = {"name": "fuzz", "trained": [], "references": {}}
    write_export(folder / "export", model=model, params=random_params(model), tokenizer=tokenizer, card=card)

    def read(rng: random.Random) -> object:
        return [record.read, loading.origin, lambda path: repr(loading.load(path))][rng.randrange(3)](folder / "export")

    return Target(folder, _files(folder / "export"), read)


def prompts(folder: Path) -> Target:
    """Prompt files of tools.generate."""
    from tools.generate import read_prompts

    (folder / "a.jsonl").write_text('{"prompt": "def f("}\n"x"\n')
    (folder / "b.txt").write_text("def f(x):\nclass A:\n")
    files = _files(folder)
    return Target(folder, files, lambda rng: [read_prompts(path) for path in files])
