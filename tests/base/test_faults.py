"""What `--inject` takes, and that each fault strikes once, where it was said."""

from __future__ import annotations

from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.faults import Faults, flip_bit


@pytest.mark.parametrize(
    "spec", ["kill", "kill@", "kill@lunch", "explode@step", "kill@step:0", "kill@step:x", "nan@save", "diskfull@step"]
)
def test_what_is_not_a_fault_is_explained(spec: str) -> None:
    with pytest.raises(UserError, match=rf"--inject={spec}: expected KIND@PLACE:N, KIND one of kill.*PLACE one of"):
        Faults(f"nan@step:3,{spec}")


def test_a_fault_strikes_once_at_its_place() -> None:
    faults = Faults("nan@step:10, bitflip@checkpoint:2")
    assert faults.reach("step", 9) == set()
    assert faults.reach("checkpoint") == set()
    assert faults.reach("step", 10) == {"nan"}
    assert faults.reach("step", 10) == set()
    assert faults.reach("checkpoint") == {"bitflip"}
    assert faults.reach("checkpoint") == set()


def test_a_flip_changes_one_bit_of_the_largest_file(tmp_path: Path) -> None:
    contents = {"small": bytes(10), "deep/large": bytes(range(200))}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert flip_bit(tmp_path) == tmp_path / "deep" / "large"
    changed = (tmp_path / "deep" / "large").read_bytes()
    assert (tmp_path / "small").read_bytes() == contents["small"]
    differences = [a ^ b for a, b in zip(contents["deep/large"], changed, strict=True) if a != b]
    assert [bin(difference).count("1") for difference in differences] == [1]
