"""Scripts that run in another tool's interpreter, with the project's packages beside its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def finds_equal(variable: str, script: str, *words: str) -> None:
    """Run a script in the interpreter that an environment variable names; its last word must be "equal"."""
    paths = os.pathsep.join([str(ROOT / "src"), *(path for path in sys.path if path.endswith("site-packages"))])
    command = [os.environ[variable], "-c", script, *words]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert ran.stdout.splitlines()[-1:] == ["equal"], ran.stderr[-3000:]
