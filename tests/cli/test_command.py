"""The command's frame: exit codes, JSON, errors without tracebacks. What verbs do is in tests/end_to_end."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch

from gossamer import cli, errors
from gossamer.catalog import catalog
from gossamer.cli import main
from gossamer.cli.doctor import examined
from gossamer.cli.fetch import shown
from gossamer.cli.shared import wants_colour
from gossamer.pages.tables import aligned

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GossamerError)]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the verb `doctor` fail in a given way."""

    @click.command()
    @click.option("--json", is_flag=True)
    def broken(json: bool) -> None:
        raise error

    monkeypatch.setattr(cli._Verbs, "get_command", lambda self, ctx, name: broken)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_each_error_has_its_exit_code_and_no_traceback(
    kind: type[errors.GossamerError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    raising(monkeypatch, kind("it failed", where="a.yaml:3", hint="try b"))
    assert main(["doctor"]) == kind.exit_code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"{kind.code}: it failed\n  where:    a.yaml:3\n  hint:     try b")
    assert main(["doctor", "--json"]) == kind.exit_code
    assert json.loads(capsys.readouterr().out) == {
        "error": {"code": kind.code, "what": "it failed", "where": "a.yaml:3", "hint": "try b"}
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
        (torch.OutOfMemoryError("CUDA out of memory"), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (OSError(errno.EACCES, "Permission denied"), 1),
        (ZeroDivisionError("oh"), 1),
    ],
)
def test_what_python_raises_becomes_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    raising(monkeypatch, error)
    assert main(["doctor"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_faults_show_where_when_asked(monkeypatch: pytest.MonkeyPatch):
    raising(monkeypatch, ZeroDivisionError("oh"))
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["train"], ["eval", "--base", "x"], ["merge", "a", "--base", "b"], ["generate", "--base", "b"],
     ["eval", "--base", "x", "--data", "y", "--task", "z"], ["fetch", "nonsense"]],
)  # fmt: skip
def test_wrong_usage_is_2(words: list[str]):
    assert main(words) == 2


def test_wrong_usage_is_json_too(capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["error"] == {"code": "usage", "what": "Missing option '--base'."}
    assert told.err == ""


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path):
    script = "import sys; from gossamer.cli import main; code = main(['fetch', '--list']); sys.exit(code)"
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([sys.executable, "-u", "-c", script], stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        assert process.stderr
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch):
    terminal, file = SimpleNamespace(isatty=lambda: True), SimpleNamespace(isatty=lambda: False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour(terminal)  # pyright: ignore[reportArgumentType]
    assert not wants_colour(file)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(terminal)  # pyright: ignore[reportArgumentType]


def test_every_verb_has_its_file_and_help(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    listing = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"\n  {verb} " in listing
        assert main([verb, "--help"]) == 0
        assert f"gossamer {verb}" in capsys.readouterr().out


def test_the_catalog_is_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path))
    assert main(["fetch", "--list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert main(["fetch", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [*catalog.CATALOG]
    assert not any(one["folder"] for one in listed)


def test_fetching_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]):
    progress = shown("toy")
    for done in range(0, 101, 5):
        progress(done * 10_000, 1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12, "a line a tenth, and one for what follows"
    assert "s left" in lines[0]
    assert "converting" in lines[-1]


def test_doctor_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert examined()["problems"] == []
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.1" if name == "torch" else "99.0")
    assert main(["doctor"]) == 4
    assert "problem: torch 2.9.1 is below 2.10" in capsys.readouterr().out


def test_columns_line_up():
    assert aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"
    assert aligned([]) == ""
