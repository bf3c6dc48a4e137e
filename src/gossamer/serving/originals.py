"""The files of adapters as they were when they were first read.

A name means the value that was first read of its folder until it is given another meaning, whatever is put into the
folder meanwhile, and whether or not the value is in memory then. So the weights' file is kept open: what was removed or
replaced can be read again, and whether it is still the same is for its digest to say.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gossamer.adapter import Adapter
from gossamer.files.folder import CONFIG, OURS, WEIGHTS

MOST = 128
"""Files that are kept open at a time."""


class Original:
    """One adapter folder's files."""

    def __init__(self, folder: Path) -> None:
        self.small: dict[str, bytes] = {}
        self.weights: BinaryIO | None = None
        if os.name == "nt":  # a file that is open there cannot be replaced
            return
        with suppress(OSError):
            there = [name for name in (CONFIG, WEIGHTS, OURS) if os.path.isfile(folder / name)]  # a pipe would block
            self.small = {name: (folder / name).read_bytes() for name in there if name != WEIGHTS}
            if WEIGHTS in there:
                self.weights = open(folder / WEIGHTS, "rb")  # noqa: SIM115  # kept open

    def read(self) -> Adapter:
        """The adapter of these files. Raises what `Adapter.load` raises, as where they are not kept any more."""
        with tempfile.TemporaryDirectory() as place:
            for name, content in self.small.items():
                Path(place, name).write_bytes(content)
            if self.weights:
                self.weights.seek(0)
                with open(Path(place, WEIGHTS), "wb") as file:
                    shutil.copyfileobj(self.weights, file)
            return Adapter.load(place)


class Originals:
    """Those of an engine's adapters, the newest `MOST`."""

    def __init__(self) -> None:
        self.kept: list[Original] = []

    def of(self, folder: Path) -> Original:
        """Keep a folder's files from now on."""
        found = Original(folder)
        self.kept.append(found)
        for one in self.kept[:-MOST]:
            self.forget(one)
        return found

    def forget(self, *originals: Original | None) -> None:
        """Keep these no more."""
        for one in originals:
            if one in self.kept:
                self.kept.remove(one)
                if one.weights:
                    one.weights.close()
                one.weights = None
