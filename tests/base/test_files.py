"""Whatever lies at a path, reading it gives its content or one message, at once."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from smallcoder_jax.base import files
from smallcoder_jax.base.errors import UserError


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_pipe, "it is a pipe"),
        (make_socket, "it is a socket"),
        (link_to_device, "it is a device"),
        (make_folder, "it is a folder"),
        (make_loop, "symbolic links"),
        (make_sparse, "larger than 67,108,864 bytes"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "is not UTF-8"),
        (lambda path: path.write_bytes(b"[" * 100_000), "nested too deep"),
        (lambda path: path.write_bytes(b"[" * 200 + b"]" * 200), "nested deeper than 100"),
        (lambda path: path.write_text('{"step": Infinity}'), "Infinity is no JSON number"),
        (lambda path: path.write_text('{"step": 1e999}'), "1e999 is too large"),
        (lambda path: path.write_text("9" * 5000), "integer string conversion"),
        (lambda path: path.write_text(""), "Expecting value"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_json_file_is_one_message_at_once(make: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    make(path)  # pyright: ignore[reportCallIssue]
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as raised:
        files.read_json(path, "a record")
    assert time.monotonic() - start < 5
    assert str(path) in str(raised.value)
    assert "expected a record" in str(raised.value)


def test_a_file_that_turns_into_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pipe = tmp_path / "file", tmp_path / "pipe"
    path.write_text("{}")
    os.mkfifo(pipe)
    stat = os.stat

    def exchange(asked: Path) -> os.stat_result:
        found = stat(asked)
        os.replace(pipe, path)
        return found

    monkeypatch.setattr(files.os, "stat", exchange)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            files.read_regular(path, 10)
        except OSError as error:
            raised.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert [type(error) for error in raised] == [files.NotAFile]


def test_a_name_no_system_takes_is_one_message() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(Path("a\0b"), "a record")
    with pytest.raises(UserError, match="File name too long"):
        files.read_json(Path("a" * 10_000), "a record")


def test_a_file_of_the_system_that_says_it_is_empty_is_bounded(tmp_path: Path) -> None:
    assert files.read_regular(Path("/proc/self/status"), 1 << 20).startswith(b"Name:")
    with pytest.raises(files.TooLarge):
        files.read_regular(Path("/proc/self/status"), 10)


def test_rows_may_hold_numbers_that_are_not_finite() -> None:
    assert str(files.parse_json('{"a": NaN, "b": 1e999}', finite_only=False)) == "{'a': nan, 'b': inf}"
    with pytest.raises(ValueError, match="nested"):
        files.parse_json("[" * 100_000, finite_only=False)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\\r\\n"}\r\n')
    assert files.read_json_object(tmp_path / "a.json", "a record") == {"a": "\r\n"}
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not a JSON object; expected a record"):
        files.read_json_object(tmp_path / "a.json", "a record")


def test_what_is_written_is_read_again_half_a_surrogate_too(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"a": float("nan"), "b": Path("x"), "é": 1})
    assert files.read_json(path, "a record") == {"a": None, "b": "x", "é": 1}
    files.write_json(path, {"a": "\ud800"})
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]
    assert files.read_json(path, "a record") == {"a": "\ud800"}
