"""Small trees of source code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from smallcoder_jax.config import Config, from_config_dict


def code(number: int) -> str:
    return f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Forty different files in one flat folder."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(40):
        (folder / f"f{number:02d}.py").write_text(code(number))
    return folder


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A config with the byte tokenizer and `tmp_path/data`, changed by `data.*` values."""

    def make(sources: str, **data: object) -> Config:
        return from_config_dict(
            {
                "model": {"vocab_size": 256},
                "tokenizer": {"kind": "bytes"},
                "data": {"sources": sources, "dir": str(tmp_path / "data"), "validation_fraction": 0.2, **data},
            }
        )

    return make
