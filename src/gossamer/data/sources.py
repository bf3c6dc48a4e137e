"""Rows from anywhere: a data file, rows or records in memory, or a `datasets.Dataset`; one reader for all of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from gossamer.data.containers import RowFaults, Table
from gossamer.data.formats import Rows, parse_records, read_rows
from gossamer.data.rows import Row
from gossamer.errors import DataError

Records = Iterable[Row] | Iterable[Mapping[str, Any]]
"""Rows, or records in any of the known formats: a list, a `datasets.Dataset`, or anything else that gives them."""


def read_data(source: str | os.PathLike[str] | Rows | Records, *, format: str | None = None) -> Rows:
    """The rows of a file, or of what is in memory, validated one by one.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; rows; or records in any of the known formats, such as a list of
            dicts or a `datasets.Dataset`.
        format: a key of `FORMATS`; found by the columns if not given.

    Raises `DataError` with every fault, each with its row and reason.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | os.PathLike):
        if re.match(r"memory: .* sha256 \w+$", str(source)):
            raise DataError("these rows were in memory, not in a file", got=str(source),
                            hint="pass them again: TrainConfig(data=rows, ...), with resume=True to go on")  # fmt: skip
        return read_rows(source, format=format)
    return _in_memory(source, format)


def _in_memory(source: Any, format: str | None) -> Rows:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError("rows in memory are a list of records, or another iterable of them", got=type(source).__name__,
                        hint="of several splits, choose one")  # fmt: skip
    given, faults = list(source), RowFaults("memory")
    if not given:
        raise DataError("there are no rows", where=faults.path, got=f"an empty {type(source).__name__}")
    kind = Row if isinstance(given[0], Row) else Mapping
    for number, one in enumerate(given, start=1):
        if not isinstance(one, kind):
            expected = "a row, like the first one" if kind is Row else "a record: a mapping of names to values"
            faults.add(number, f"expected {expected}; got {type(one).__name__} {one!r:.40}")
    faults.check("these rows cannot be used", hint="of a pandas.DataFrame, pass to_dict('records')")
    if kind is Row:
        rows, name, unused = tuple(given), " and ".join(sorted({type(one).__name__.lower() for one in given})), ()
    else:
        records = [(number, dict(record)) for number, record in enumerate(given, start=1)]
        found = parse_records(Table(faults.path, type(source).__name__, "", records), faults, format)
        rows, name, unused = found.rows, found.format, found.unused
    return Rows(faults.path, type(source).__name__, name, _digest(rows), rows, unused, in_memory=True)


def _digest(rows: Iterable[Row]) -> str:
    """sha256 of what the rows hold, wherever they stand."""
    total = hashlib.sha256()
    for row in rows:
        held = asdict(row, dict_factory=lambda fields: {name: value for name, value in fields if name != "where"})
        total.update(json.dumps([type(row).__name__, held], sort_keys=True, default=str).encode())
    return total.hexdigest()
