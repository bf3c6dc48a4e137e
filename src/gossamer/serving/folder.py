"""A folder of adapters: what lies in it, and what names were given another meaning while it was served."""

from __future__ import annotations

import logging
from pathlib import Path

from gossamer.errors import AdapterFileError, DiskError, UsageError
from gossamer.files.atomic import write_json
from gossamer.files.folder import CONFIG, read_json

NAMES = "names.json"
"""In the folder: name -> the subfolder that it means instead of its own, or null for none. Absent as long as every
name means its own."""

log = logging.getLogger("gossamer.serving")


class Folder:
    """Adapters in the subfolders of one folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def adapters(self) -> dict[str, Path]:
        """Every name and where its adapter lies, sorted: subfolders by their own names, but for what was kept.

        Raises: UsageError if there is no such folder; AdapterFileError if what was kept cannot be read.
        """
        if not self.root.is_dir():
            raise UsageError("adapters are a folder of adapters", where=str(self.root), got="no such folder")
        found = {one.name: one for one in self.root.iterdir() if (one / CONFIG).is_file()}
        for name, path in self._kept().items():
            found.pop(name, None)
            if path is not None:
                if folder := self.inside(path):
                    found[name] = folder
                else:
                    log.warning("the name %s is left out: no adapter is where %s says", name, NAMES)
        return dict(sorted(found.items()))

    def inside(self, path: str) -> Path | None:
        """The adapter at a path, if it lies inside the folder with all its files, links followed."""
        try:
            root = self.root.resolve(strict=True)
            found = (root / path).resolve(strict=True)
            fine = found != root and found.is_relative_to(root) and (found / CONFIG).is_file()
            # nor may a link in it lead out
            fine = fine and all(one.resolve().is_relative_to(root) for one in found.iterdir())
        except (OSError, ValueError):
            return None
        return found if fine else None

    def keep(self, name: str, folder: Path | None) -> bool:
        """Let a name mean this adapter, or none, after a restart too; False if the folder cannot be written to."""
        path = folder.relative_to(self.root.resolve()).as_posix() if folder else None
        own = name if (self.root / name / CONFIG).is_file() else None
        try:
            kept = {one: where for one, where in self._kept().items() if one != name}
            write_json(self.root / NAMES, kept | ({name: path} if path != own else {}))
        except (DiskError, AdapterFileError) as error:
            log.warning("what the name %s means is not kept: %s", name, error.what)
            return False
        return True

    def _kept(self) -> dict[str, str | None]:
        file = self.root / NAMES
        kept = read_json(file) if file.exists() else {}
        if not all(where is None or isinstance(where, str) for where in kept.values()):
            raise AdapterFileError("names and the subfolders that they mean", where=str(file), expected="texts or null")
        return kept
