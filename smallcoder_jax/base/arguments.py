"""The parser of every command's flags."""

from __future__ import annotations

import argparse
from typing import NoReturn

from smallcoder_jax.base.display import printable


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, whose messages repeat what was typed so that it cannot steer the terminal."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message and printable(message))
