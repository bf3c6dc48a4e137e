"""Which folder is the adapter: what people name when they mean one, and what lies there instead of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterFileError
from gossamer.files.atomic import TEMPORARY_SUFFIX
from gossamer.files.folder import CONFIG, OURS, PICKLE, WEIGHTS, missing_hint, read_json, refuse_pickle

_MOST_HEADER = 2**27


def adapter_of(folder: str | Path) -> Path:
    """The adapter folder that is meant by an adapter folder, or by a run folder that holds one.

    A checkpoint of PEFT's or transformers' trainers is an adapter folder; one of our runs is not, as the run's
    `adapter/` is. Raises `AdapterFileError`, which says what lies there instead.
    """
    folder = Path(folder)
    for place in (folder, folder / "adapter"):
        if (place / CONFIG).is_file():
            return place
    raise AdapterFileError(
        "no adapter here",
        where=str(folder),
        expected="a folder with adapter_config.json, or a run folder with adapter/",
        hint=instead_of_adapter(folder),
    )


def instead_of_adapter(folder: Path) -> str:
    """What that has to do with adapters lies in a folder that is none; "" where nothing does. Names no other folder."""
    if not os.path.isdir(folder):
        return "this is a file" if os.path.exists(folder) else "the folder does not exist"
    if is_leftover(folder.name):
        return "an interrupted save left it"
    try:
        held = sorted(folder.iterdir())
        below = [one.name for one in held if (one / CONFIG).is_file()]
    except OSError:
        return "the folder cannot be read"
    names = {one.name for one in held}
    if {"adapter.safetensors", "state.json"} <= names:
        return "a checkpoint of a run: its adapter is in the run's folder, once the run is finished"
    if "checkpoints" in names:
        return "this run is not finished; resume it"
    if below:
        more = ", ..." if len(below) > 8 else ""
        return f"adapters lie below it: {', '.join(below[:8])}{more}; name one of them"
    if beside := sorted(names & {WEIGHTS, PICKLE, OURS}):
        return f"{beside[0]} lies there without {CONFIG}"
    return ""


def is_leftover(name: str) -> bool:
    """Whether a folder is called as one that is being written, or whose writing was interrupted."""
    return name.endswith(TEMPORARY_SUFFIX)


def glance(folder: Path) -> Mapping[str, Any] | None:
    """See whether a folder can be an adapter, by its JSON and the length of its weights; no tensor is read.

    Returns the fingerprint of the base that it was made for, where it says so.

    Raises: AdapterFileError; UnsupportedError for a pickle.
    """
    read_json(folder / CONFIG, missing=missing_hint(folder))
    weights = folder / WEIGHTS
    refuse_pickle(folder)
    if not os.path.isfile(weights):
        raise AdapterFileError("cannot read an adapter's file", where=str(weights), got="no such file")
    try:
        _check_length(weights)
    except OSError as error:
        raise AdapterFileError("cannot read an adapter's file", where=str(weights), got=error.strerror or "") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = str(error) if type(error) is ValueError else "a header that cannot be read"
        raise AdapterFileError("not a whole safetensors file", where=str(weights), got=got) from None
    base = read_json(folder / OURS).get("base") if (folder / OURS).exists() else None
    return base if isinstance(base, dict) else None


def _check_length(weights: Path) -> None:
    """Raise `ValueError` where a safetensors file is shorter or longer than its header says."""
    size = weights.stat().st_size
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{size:,} bytes, shorter than its header")
        header = json.loads(file.read(length))
    ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{size:,} bytes where its header tells of {expected:,}")
