"""The shell commands of docs/api.md, as they stand there, against a server; its Python runs with all other pages."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer.serving.api.app import create_app
from tests.serving.api.conftest import engine

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
[MODELS] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command: str, folder: Path, listening: Callable[[Any], str], tmp_path: Path) -> None:
    address = listening(create_app(engine(folder), name="smollm2-135m", folder=folder))
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.replace("http://127.0.0.1:8000", address))
    words = shlex.split(command.replace("\\\n", "").replace("http://127.0.0.1:8000", address))
    if words[0] == "llm":
        words[:1] = [sys.executable, "-m", "llm"]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(words, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert b'"error"' not in done.stdout


def test_every_route_stands_on_the_page(client: Any) -> None:
    for path in client.app.openapi()["paths"]:
        assert f"/{path.replace('{name}', 'NAME').lstrip('/')}" in PAGE
