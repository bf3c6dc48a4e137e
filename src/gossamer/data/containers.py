"""From a data file to plain records: JSON Lines, JSON arrays, CSV and Parquet.

A container knows nothing about training: it gives each record with its row number and notes in `RowFaults` whatever it
cannot read, so that one error shows everything that is wrong with a file. The file is read once; the digest is the
digest of the very bytes that were parsed.

Row numbers count from 1. They are lines in JSON Lines and CSV files, as an editor shows them, and positions in JSON
arrays and Parquet files.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gossamer.errors import DataError, UnsupportedError, nearest

LONGEST_LINE = 16 * 2**20
"""Bytes. A longer line is no training row but a mistake, such as a file that lost its line breaks."""

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""How the names of data files end, and what is in them."""
_JSON_COLUMNS = ("messages", "conversations")  # CSV cells hold text only; lists of turns are written into them as JSON
_TURN_LISTS = (*_JSON_COLUMNS, "prompt", "completion", "tools", "functions", "history", "chosen", "rejected")
"""Lists that belong to one row; any other list of objects in a lone object is a list of rows."""
_WIDE_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16-LE does
_SPACE = re.compile(r"[ \t\r\n]*")


NumberedRecords = list[tuple[int, dict[str, Any]]]
"""Row number and fields of each record."""


class RowFaults:
    """Everything wrong with a set of rows, collected until `check` raises it as one `DataError`."""

    shown = 20

    def __init__(self, path: str | os.PathLike[str] = "") -> None:
        self.path = str(path)
        self.found: list[str] = []

    def add(self, row: int, reason: str) -> None:
        """Note what is wrong with one row of the file."""
        self.at(f"{self.path}:{row}", reason)

    def at(self, where: str, reason: str) -> None:
        """Note what is wrong at a place given as `file:row`."""
        self.found.append(f"{where}: {reason}")

    def check(self, what: str, *, hint: str = "") -> None:
        """Raise a `DataError` that lists the first faults and counts the rest; return if there are none."""
        if not self.found:
            return
        more = len(self.found) - self.shown
        listing = [f"  - {fault}" for fault in self.found[: self.shown]] + [f"  - and {more:,} more"] * (more > 0)
        raise DataError("\n".join([what, *listing]), hint=hint)


@dataclass(frozen=True)
class Table:
    """The records of one file: `(row number, fields)`, the container they came in and the file's sha256."""

    path: str
    container: str
    digest: str
    records: NumberedRecords


def read_table(path: str | os.PathLike[str], faults: RowFaults) -> Table:
    """Read every record of a file, by its suffix or else by its content.

    Rows that cannot be read are noted in `faults`; whoever calls decides when to `check` them.
    Raises `DataError` for a file that cannot be read at all, `UnsupportedError` for Parquet without pyarrow.
    """
    data = _read_bytes(Path(path))
    container = _container_of(path, data)
    if container != "parquet" and (data.startswith(_WIDE_ENCODINGS) or b"\0" in data[:4]):
        raise DataError("the file is not UTF-8", where=str(path), got="UTF-16 or UTF-32", expected="UTF-8",
                        hint="convert it, for example with: iconv -f UTF-16 -t UTF-8")  # fmt: skip
    wrapped = _object_over_lines(data, faults) if container == "jsonl" else None
    container, records = wrapped or (container, list(_READERS[container](data, faults)))
    if not records and not faults.found:
        raise DataError("the file holds no rows", where=str(path), got=f"{len(data):,} bytes")
    return Table(str(path), container, hashlib.sha256(data).hexdigest(), records)


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        siblings = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError("no such data file", where=str(path), hint=nearest(path.name, siblings))
    if not path.is_file():
        raise DataError("a data file is a regular file", where=str(path), got="a folder or a device")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("the data file cannot be read", where=str(path), got=str(error)) from None


def _container_of(path: str | os.PathLike[str], data: bytes) -> str:
    by_suffix = SUFFIXES.get(Path(path).suffix.lower())
    if by_suffix and by_suffix != "json":  # many .json files out there hold JSON Lines, so those are looked into
        return by_suffix
    start = data[:4096].removeprefix(codecs.BOM_UTF8).lstrip()
    by_content = {b"[": "json", b"{": "jsonl"}.get(start[:1]) or ("parquet" if start[:4] == b"PAR1" else None)
    if found := by_content or by_suffix:
        return found
    raise DataError("cannot tell what kind of file this is", where=str(path), got=repr(start[:20]),
                    expected="a name that ends in " + ", ".join(SUFFIXES))  # fmt: skip


def _lines(data: bytes, faults: RowFaults) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, with or without a byte order mark.

    A bad byte is noted and then read as a replacement character: the file is refused by then, but the lines after it
    are still worth checking.
    """
    offset = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    for number, line in enumerate(io.BytesIO(data[offset:]), start=1):
        if len(line) > LONGEST_LINE:
            faults.add(number, f"the line holds {len(line):,} bytes, more than the {LONGEST_LINE:,} allowed")
            line = b""
        if b"\0" in line:
            faults.add(number, f"NUL byte at offset {offset + line.index(0):,} of the file")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = line[error.start]
            faults.add(number, f"byte 0x{bad:02x} at offset {offset + error.start:,} of the file is not UTF-8")
            text = line.decode("utf-8", errors="replace")
        yield number, text.replace("\0", " ")
        offset += len(line)


def _read_jsonl(data: bytes, faults: RowFaults) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in _lines(data, faults):
        if text.strip() and (record := _record(text.rstrip(), number, faults)) is not None:
            yield number, record


def _object_over_lines(data: bytes, faults: RowFaults) -> tuple[str, NumberedRecords] | None:
    """Container and rows of a file that is one JSON object, in the one list that it holds beside no fields of a row.

    None for proper JSON Lines, and where the object cannot be read; no rows, with one fault noted, for objects that are
    written over several lines each, or one in which it is not clear what the rows are.
    """
    first = next(filter(None, map(bytes.strip, data[:LONGEST_LINE].splitlines())), b"").removeprefix(codecs.BOM_UTF8)
    single = first == data.removeprefix(codecs.BOM_UTF8).strip()  # rows may be wrapped in one line, too
    if (first.endswith(b"}") and not single) or len(first) > LONGEST_LINE:
        return None
    try:
        text = data.decode("utf-8-sig")
        value, end = _STRICT.raw_decode(text, _after_space(text, 0))
    except (ValueError, RecursionError) as error:
        if first != b"{":  # no line of JSON Lines, so the file is an object that is not right
            return None
        faults.add(1, _json_reason(error))
        return "json", []
    if not isinstance(value, dict):
        return None
    lists = [key for key, inner in value.items() if inner and isinstance(inner, list) and isinstance(inner[0], dict)]
    rows = [key for key in lists if key not in _TURN_LISTS]
    if text[end:].strip():
        lines = text.count("\n", 0, end) + 1
        faults.add(1, f"the object goes on for {lines} lines; JSON Lines has one object a line, JSON an array of them")
        return "json", []
    if len(rows) == len(lists) == 1:
        source = json.dumps(value[rows[0]])  # read again, strictly and element by element
        return f"json, the list {rows[0]!r}", list(_read_json(source.encode(), faults))
    if single:
        return None
    found = f"several lists: {', '.join(rows)}" if len(rows) > 1 else f"the fields {', '.join(value) or 'of nothing'}"
    faults.add(1, f"the file is one object with {found}; a .json data file holds an array of objects, one for each row")
    return "json", []


def _read_json(data: bytes, faults: RowFaults) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(line for _, line in _lines(data, faults))
    for number, element in enumerate(_elements(text, faults), start=1):
        if (record := _record(element, number, faults)) is not None:
            yield number, record


def _elements(text: str, faults: RowFaults) -> Iterator[str]:
    """The source of each element of a JSON array, cut out one by one so that a fault can name its row."""
    decoder, row = json.JSONDecoder(), 0
    position = _after_space(text, 0)
    if text[position : position + 1] != "[":
        faults.add(1, "a .json data file holds an array of objects; one object a line is JSON Lines (.jsonl)")
        return
    position = _after_space(text, position + 1)
    separator = "]" if text[position : position + 1] == "]" else ","
    while separator == ",":
        row += 1
        try:
            end = decoder.raw_decode(text, position)[1]
        except (ValueError, RecursionError) as error:
            faults.add(row, f"{_json_reason(error)}; nothing after it can be read")
            return
        yield text[position:end]
        position = _after_space(text, end)
        separator, position = text[position : position + 1], _after_space(text, position + 1)
    if separator != "]":
        faults.add(row, f"after this row comes {separator or 'the end of the file'!r}, not ',' or ']'")
    elif row and position < len(text):
        faults.add(row, "the file goes on after the array's closing ']'")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _record(text: str, row: int, faults: RowFaults) -> dict[str, Any] | None:
    """One JSON object; anything else is noted in `faults`."""
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        faults.add(row, _json_reason(error))
        return None
    if isinstance(value, dict):
        return value
    faults.add(row, f"a row is an object with named fields; got {kind_of(value)}")
    return None


def _json_reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    cut = error.msg.startswith("Unterminated") or not error.doc[error.pos :].strip()
    place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    return f"not valid JSON: {error.msg.removesuffix(' at')}, {place}{' (the text is cut off)' if cut else ''}"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words: `"a list"`, `"null"`."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object")
    return fields


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _read_csv(data: bytes, faults: RowFaults) -> NumberedRecords:
    """Comma-separated values with a header line; a record may span lines inside quotes."""
    before = csv.field_size_limit(LONGEST_LINE)  # one setting for the whole process, so it is put back
    try:
        return _csv_records(csv.reader((text for _, text in _lines(data, faults)), strict=True), faults)
    finally:
        csv.field_size_limit(before)


def _csv_records(reader: Any, faults: RowFaults) -> NumberedRecords:
    header: list[str] = []
    records: NumberedRecords = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            faults.add(line, f"not valid CSV: {error}")
            continue
        if cells is None:
            return records
        if not header:
            header = cells
            if len(set(header)) < len(header):
                faults.add(line, f"the header names a column twice: {', '.join(header)}")
        elif cells and len(cells) != len(header):
            faults.add(line, f"{len(cells)} fields, but the header names {len(header)}")
        elif cells and (record := _csv_record(dict(zip(header, cells, strict=True)), line, faults)):
            records.append((line, record))


def _csv_record(record: dict[str, Any], line: int, faults: RowFaults) -> dict[str, Any] | None:
    for column in set(_JSON_COLUMNS) & set(record):
        try:
            record[column] = _STRICT.decode(record[column])
        except (ValueError, RecursionError) as error:
            faults.add(line, f"column {column!r}: {_json_reason(error)}")
            return None
    return record


def _read_parquet(data: bytes, faults: RowFaults) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError("reading Parquet needs pyarrow", where=faults.path,
                               hint="pip install 'gossamer[data]'") from None  # fmt: skip
    try:
        records = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError("not a readable Parquet file", where=faults.path, got=f"{error!s:.200}") from None
    return enumerate(records, start=1)


_READERS: dict[str, Callable[[bytes, RowFaults], Any]] = {
    "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet,
}  # fmt: skip
