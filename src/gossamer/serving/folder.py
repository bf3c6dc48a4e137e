"""A folder of adapters: what lies in it, and what names were given another meaning while it was served."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.attachment.walk import differing
from gossamer.errors import AdapterFileError, BaseMismatchError, DiskError, GossamerError, UsageError
from gossamer.files.atomic import write_json
from gossamer.files.folder import CONFIG, read_json
from gossamer.files.places import adapter_of, glance, instead_of_adapter, is_leftover

NAMES = "names.json"
"""In the folder: name -> the subfolder that it means instead of its own, or null for none. Absent as long as every
name means its own."""
LONGEST_NAME = 256
"""Characters of a name that a request may hold. Names are compared letter by letter: `SQL` and `sql` are two."""

log = logging.getLogger("gossamer.serving")


class FolderContents(NamedTuple):
    """What a folder holds.

    Attributes:
        adapters: name -> where it lies. refused: name -> why what lies there cannot be used.
    """

    adapters: dict[str, Path]
    refused: dict[str, GossamerError]


class Folder:
    """Adapters in the subfolders of one folder, each an adapter's or a run's; or the one that the folder itself is."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def adapters(self, base: Mapping[str, Any] | None = None) -> dict[str, Path]:
        """Every name and where its adapter lies, sorted; what `found` refuses is left out, with a line in the log."""
        return self.found(base).adapters

    def found(self, base: Mapping[str, Any] | None = None) -> FolderContents:
        """Every name and where its adapter lies, sorted: subfolders by their own names, but for what was kept.

        What cannot be used is noted in the log, each with its reason, as is a folder that holds nothing to serve. No
        tensor is read for it.

        Args:
            base: fingerprint of the base that they are for; what says that it was made for another one is refused.

        Raises: UsageError if there is no such folder; AdapterFileError if what was kept cannot be read.
        """
        if not self.root.is_dir():
            raise UsageError("adapters are a folder of adapters", where=str(self.root), got="no such folder")
        one = self._is_one
        places = {self.root.resolve().name: self.root} if one else {it.name: it for it in self._subfolders()}
        refused: dict[str, GossamerError] = {}
        for name, path in ({} if one else self._kept()).items():
            places.pop(name, None)
            if path is not None:
                if folder := self.inside(path):
                    places[name] = folder
                else:
                    log.warning("the name %s is left out: no adapter is where %s says", name, NAMES)
        adapters: dict[str, Path] = {}
        for name, place in sorted(places.items()):
            try:
                adapters[name] = _usable(name, place, base)
            except GossamerError as error:
                refused[name] = error
                log.warning("%r is left out: %s", name, ": ".join(filter(None, (error.what, error.hint or error.got))))
        if not adapters:
            log.warning("no adapter to serve was found in %s", self.root)
        return FolderContents(adapters, refused)

    def named(self, name: str) -> Path | None:
        """The adapter in the subfolder of this name, if it came since and nothing was kept of the name."""
        try:
            check_name(name)
            if self._is_one or "/" in name or "\\" in name or name in self._kept():
                return None
        except GossamerError:
            return None
        return self.inside(name)

    def inside(self, path: str) -> Path | None:
        """The adapter at a path, if it lies inside the folder with all its files, links followed."""
        try:
            root = self.root.resolve(strict=True)
            if self._is_one and path == root.name:
                path = "."
            found = (root / path).resolve(strict=True)
            if not found.is_relative_to(root) or (found == root and not self._is_one):
                return None
            found = adapter_of(found).resolve(strict=True)
            fine = found.is_relative_to(root) and not any(map(is_leftover, found.relative_to(root).parts))
            # nor may a link in it lead out
            fine = fine and all(one.resolve().is_relative_to(root) for one in found.iterdir())
        except (OSError, ValueError, AdapterFileError):
            return None
        return found if fine else None

    def keep(self, name: str, folder: Path | None) -> bool:
        """Let a name mean this adapter, or none, after a restart too; False if the folder cannot be written to, or is
        itself the adapter."""
        if self._is_one:
            return False
        own = self.inside(name) if "/" not in name else None
        path = folder.relative_to(self.root.resolve()).as_posix() if folder else None
        try:
            kept = {one: where for one, where in self._kept().items() if one != name}
            write_json(self.root / NAMES, kept | ({name: path} if folder != own else {}))
        except (DiskError, AdapterFileError) as error:
            log.warning("what the name %s means is not kept: %s", name, error.what)
            return False
        return True

    @property
    def _is_one(self) -> bool:
        """Whether the folder is itself an adapter's or a run's; one that holds an adapter called `adapter` is not."""
        return (self.root / CONFIG).is_file() or (_holds_one(self.root) and (self.root / "config.yaml").is_file())

    def _subfolders(self) -> list[Path]:
        """Those that are adapters' and runs', or look as if they should be."""
        return [one for one in self.root.iterdir() if one.is_dir() and (_holds_one(one) or instead_of_adapter(one))]

    def _kept(self) -> dict[str, str | None]:
        file = self.root / NAMES
        kept = read_json(file) if file.exists() else {}
        if not all(where is None or isinstance(where, str) for where in kept.values()):
            raise AdapterFileError("names and the subfolders that they mean", where=str(file), expected="texts or null")
        return kept


def _holds_one(folder: Path) -> bool:
    try:
        return bool(adapter_of(folder))
    except AdapterFileError:
        return False


def _usable(name: str, place: Path, base: Mapping[str, Any] | None) -> Path:
    """The adapter folder at a place, if it can be served under a name, as far as can be seen without its tensors."""
    if is_leftover(place.name):
        raise AdapterFileError("an interrupted save left it", where=str(place))
    check_name(name)
    folder = adapter_of(place)
    check_base(name, glance(folder), base)
    return folder


def check_base(name: str, made_for: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> None:
    """Raise `BaseMismatchError` for an adapter that was made for another base; what is not known fits all."""
    if made_for and base and (other := differing(made_for, base)):
        raise BaseMismatchError(f"this adapter was made for another base ({', '.join(other)} differ)", where=name)


def check_name(name: str) -> None:
    """Raise `UsageError` for a name that no client can ask for, or that says something else where names stand."""
    reasons = {
        "it is empty": not name,
        "it is longer than a request may say": len(name) > LONGEST_NAME,
        "it holds control or invisible characters": not name.isprintable(),
        "it begins or ends with a space": name != name.strip(),
        "it begins with a dot, as hidden folders do": name.startswith("."),
        "a star stands for all names": name == "*",
    }
    if said := [reason for reason, there in reasons.items() if there]:
        raise UsageError("this cannot be the name of an adapter or a base", got=f"{name[:64]!r}: {said[0]}")


def check_names(base: str, adapters: Iterable[str], other: str | None = None, others: Iterable[str] = ()) -> None:
    """Hold that every name means one thing: a base's, its adapters', and those of a second base for vectors.

    Raises: UsageError, which names the clash.
    """
    bases = [base] if other is None else [base, other]
    meant: dict[str, str] = {}
    for name, what in [
        *((one, "a base") for one in bases),
        *((one, f"an adapter of {base!r}") for one in adapters),
        *((one, f"an adapter of {other!r}") for one in others),
    ]:
        check_name(name)
        prefix = next((one + ":" for one in bases if name.startswith(one + ":")), "")
        if prefix:
            got = f"{name!r}: it reads as {name.removeprefix(prefix)!r} of {prefix[:-1]!r}"
            raise UsageError("a name that means something else", got=got, hint="rename the adapter's folder")
        if name in meant:
            hint = "give the base another name (--name), or rename the adapter's folder"
            raise UsageError("one name for two models", where=name, got=f"{meant[name]} and {what}", hint=hint)
        meant[name] = what
