"""The folder of a run: what stands in it, who may write there, and the files that grow.

config.yaml  metrics.jsonl  report.json  report.html  adapter/  checkpoints/step-N/
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError, DiskError, GossamerError, StateError
from gossamer.files.atomic import write_text
from gossamer.spec import read_yaml
from gossamer.data import clock


class RunFolder:
    """The places in a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.report = (
            path / name for name in ("config.yaml", "metrics.jsonl", "report.json")
        )
        self.adapter, self.checkpoints = path / "adapter", path / "checkpoints"

    def began(self) -> str:
        """The day that the chat templates of the run are told: the one in its config.yaml, or today."""
        try:
            fields = read_yaml(self.config)[0] if self.config.exists() else {}
        except GossamerError:  # a run that goes on writes it anew
            fields = {}
        data = fields.get("data")
        return str((data.get("date") if isinstance(data, Mapping) else None) or clock.today())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises `DiskError`."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise DiskError("writing failed", where=str(self.metrics), got=error.strerror or str(error)) from error

    def forget_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that a resumed run is about to write again, and one that was cut short."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if 0 <= _step_of(line) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 for a line that was not written to its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return -1
    return record.get("step", -1) if isinstance(record, dict) else -1


def refuse_output(output: str | Path, *, resume: bool = False) -> Path:
    """The folder of a run that may begin there, or be resumed there; nothing is made. Raises what `open_run` raises."""
    path = Path(output)
    if resume:
        run = RunFolder(path)
        if not path.is_dir() or not (run.config.exists() or run.checkpoints.is_dir() or not any(path.iterdir())):
            raise CheckpointError(
                "there is no run to resume",
                where=str(path),
                expected="a folder with config.yaml or checkpoints/",
                hint="start it without resume",
            )
    elif path.exists() and not path.is_dir():
        raise StateError("the output is a file, not a folder", where=str(path))
    elif path.is_dir() and any(path.iterdir()):
        raise StateError(
            "the output folder is not empty", where=str(path), hint="resume the run in it, or choose another folder"
        )
    return path


@contextmanager
def open_run(output: str | Path, *, resume: bool = False) -> Iterator[RunFolder]:
    """A run folder that nobody else writes to for the length of a block.

    Raises:
        StateError: the folder holds something and `resume` is off, or another process writes there.
        CheckpointError: there is nothing to resume.
        DiskError: it cannot be made.
    """
    path = refuse_output(output, resume=resume)
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError("cannot make the run folder", where=str(path), got=error.strerror or str(error)) from error
    with _locked(path):
        if not resume and any(path.iterdir()):
            raise StateError(
                "the output folder is not empty", where=str(path), hint="resume the run in it, or choose another folder"
            )
        try:
            yield RunFolder(path)
        finally:
            if created and not any(path.iterdir()):  # refused before anything was written
                path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder itself; the system lets go of it when this process ends, however that happens."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError("another process is training in this folder", where=str(path)) from None
        yield
    finally:
        os.close(handle)
