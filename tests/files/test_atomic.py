"""Writes happen whole or not at all: a fault at every step leaves the old content and no leftovers."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import DiskError, StateError
from gossamer.files import atomic


def refuse(number: int, after: int = 0) -> Callable[..., Any]:
    """A stand-in for a system call that fails with `number` once it has been called `after` times."""
    calls = iter(range(1_000_000))

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))

    return call


class FullDisk:
    """An open file that takes `room` bytes and then says that the disk is full."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: self.room])
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writers_write(tmp_path: Path) -> None:
    assert atomic.write_bytes(tmp_path / "a" / "b" / "data", b"\x00\xff") == tmp_path / "a" / "b" / "data"
    atomic.write_text(tmp_path / "text", "zwölf\r\n")
    atomic.write_json(tmp_path / "value.json", {"ü": [1, None]})
    assert everything(tmp_path) == {
        "a/b/data": b"\x00\xff",
        "text": "zwölf\r\n".encode(),
        "value.json": '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'.encode(),
    }


def test_overwriting_replaces(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file", "a long first version")
    atomic.write_text(tmp_path / "file", "new")
    assert everything(tmp_path) == {"file": b"new"}


def test_json_takes_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "value.json", float("nan"))
    assert everything(tmp_path) == {}


def test_files_are_readable_by_whoever_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic.write_text(tmp_path / "file", "x")
        with atomic.new_folder(tmp_path / "folder") as new:
            (new / "secret").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder" / "secret").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failing_call_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    atomic.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, call, refuse(number))
    with pytest.raises(DiskError) as caught:
        atomic.write_text(tmp_path / "file", "newer")
    monkeypatch.undo()
    assert everything(tmp_path) == {"file": b"old"}
    assert os.strerror(number) in caught.value.got
    assert str(tmp_path / "file") in caught.value.where


@pytest.mark.parametrize("room", [0, 1, 4])
def test_a_full_disk_says_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    atomic.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(atomic, "open", lambda *args: FullDisk(builtins.open(*args), room), raising=False)  # noqa: SIM115
    with pytest.raises(DiskError) as caught:
        atomic.write_bytes(tmp_path / "file", b"newer")
    assert everything(tmp_path) == {"file": b"old"}
    assert caught.value.exit_code == 5
    assert "bytes free" in caught.value.got
    assert caught.value.expected == "5 bytes free"


def test_a_failing_folder_flush_is_reported_with_the_new_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO, after=1))
    with pytest.raises(DiskError):
        atomic.write_text(tmp_path / "file", "new")
    assert everything(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    atomic.write_text(tmp_path / "file", "old")

    def half_a_file() -> None:
        with atomic.new_file(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    def half_a_folder() -> None:
        with atomic.new_folder(tmp_path / "folder") as new:
            (new / "half").write_text("half")
            raise error

    for half in (half_a_file, half_a_folder):
        with pytest.raises(error):
            half()
    assert everything(tmp_path) == {"file": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError):
        atomic.write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(DiskError), atomic.new_folder(tmp_path / "file" / "below"):
        pass


def test_reading_something_else_is_not_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.new_folder(tmp_path / "folder"):
        (tmp_path / "absent").read_text()
    assert list(tmp_path.iterdir()) == []


def test_errors_of_rust_writers_count_too(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="writing failed") as caught, atomic.new_folder(tmp_path / "folder"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "bytes free" in caught.value.got
    assert list(tmp_path.iterdir()) == []


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    with atomic.new_folder(tmp_path / "deep" / "folder") as new:
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text("x")
        assert not (tmp_path / "deep" / "folder").exists()
    assert everything(tmp_path) == {"deep/folder/sub/file": b"x"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_an_existing_folder_is_kept_unless_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(StateError, match="exists"), atomic.new_folder(target):
        pytest.fail("the block must not run")
    with atomic.new_folder(target, replace=True) as new:
        (new / "new").write_text("new")
        assert everything(target) == {"old": b"old"}
    assert everything(tmp_path) == {"folder/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(StateError), atomic.new_folder(tmp_path / "folder"):
        atomic.write_text(tmp_path / "folder" / "theirs", "x")
    assert everything(tmp_path) == {"folder/theirs": b"x"}


@pytest.mark.parametrize("after", range(4))
def test_a_folder_survives_every_failing_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Flushes come in this order: two files, their folder, then the parent; only after the last rename is it new."""
    target = tmp_path / "folder"
    atomic.write_text(target / "old", "old")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO, after=after))
    with pytest.raises(DiskError), atomic.new_folder(target, replace=True) as new:
        [(new / name).write_text(name) for name in ("1", "2")]
    assert everything(target) == ({"1": b"1", "2": b"2"} if after == 3 else {"old": b"old"})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_folder_survives_every_failing_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    target = tmp_path / "folder"
    atomic.write_text(target / "old", "old")
    rename, calls = os.rename, iter(range(10))

    def unreliable(source: Path, destination: Path) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", unreliable)
    with pytest.raises(DiskError), atomic.new_folder(target, replace=True) as new:
        (new / "new").write_text("new")
    assert everything(tmp_path) == {"folder/old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_long_names_fit(tmp_path: Path) -> None:
    name = "ä" * 120
    atomic.write_text(tmp_path / name, "x")
    assert everything(tmp_path) == {name: b"x"}


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert atomic.sha256_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
