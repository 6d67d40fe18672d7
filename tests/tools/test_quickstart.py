"""The quick start waits for what checks the export, which is installed while it trains."""

import threading
from pathlib import Path

import pytest

from smallcoder_jax.errors import UserError
from tools.quickstart import wait_for


def test_it_goes_on_when_the_checker_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamp = tmp_path / ".parity"
    timer = threading.Timer(0.3, stamp.touch)
    timer.start()
    wait_for(stamp)
    timer.join()
    assert "waiting for torch and transformers" in capsys.readouterr().out
    wait_for(stamp)
    assert not capsys.readouterr().out


def test_it_says_why_the_checker_could_not_be_installed(tmp_path: Path) -> None:
    (tmp_path / ".parity.failed").write_text("first\n" * 10 + "ERROR: No matching distribution found for torch\n")
    with pytest.raises(UserError, match="No matching distribution found for torch") as caught:
        wait_for(tmp_path / ".parity")
    assert "the same command goes on from here" in str(caught.value)
