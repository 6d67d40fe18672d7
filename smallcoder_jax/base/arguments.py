"""The argument parser that every command uses."""

from __future__ import annotations

import argparse
from typing import NoReturn

from smallcoder_jax.base.display import printable


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with messages in which the user's input is escaped and cannot control the terminal."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message and printable(message))
