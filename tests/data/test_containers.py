"""Every container yields the same records, however the file was written."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gossamer.data.containers import RowFaults, Table, read_table
from gossamer.errors import DataError, UnsupportedError

RECORDS = [
    {"prompt": "What is it?\nTell me.", "completion": " good, very"},
    {"prompt": 'She said "no"', "completion": " bad"},
    {"prompt": "Ünïcode \u2028 🙂", "completion": " great"},
]


def write(path: Path, records: list[dict], *, newline: str = "\n", bom: bytes = b"") -> Path:
    """The records in the container that the path's suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), lineterminator=newline)
            writer.writeheader()
            writer.writerows(records)
    else:
        one_by_one = [json.dumps(record, ensure_ascii=False) for record in records]
        text = newline.join(one_by_one) + newline if path.suffix == ".jsonl" else json.dumps(records, indent=2)
        path.write_bytes(bom + text.replace("\n", newline if path.suffix == ".json" else "\n").encode())
    return path


def read(path: Path) -> Table:
    faults = RowFaults(path)
    table = read_table(path, faults)
    faults.check("unreadable")
    return table


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("container", ["jsonl", "json", "csv", "parquet"])
def test_all_containers_hold_the_same_records(tmp_path: Path, container: str, bom: bytes, newline: str):
    path = write(tmp_path / f"rows.{container}", RECORDS, newline=newline, bom=bom)
    table = read(path)
    assert [record for _, record in table.records] == RECORDS
    assert table.container == container
    assert table.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("container", "rows"), [("jsonl", [1, 2, 3]), ("json", [1, 2, 3]), ("csv", [2, 4, 5]), ("parquet", [1, 2, 3])]
)
def test_row_numbers(tmp_path: Path, container: str, rows: list[int]):
    """Lines where an editor shows lines (the CSV's second row spans two, below its header), else positions."""
    table = read(write(tmp_path / f"rows.{container}", RECORDS))
    assert [number for number, _ in table.records] == rows


@pytest.mark.parametrize("container", ["jsonl", "json", "parquet"])
def test_content_decides_where_the_suffix_says_nothing(tmp_path: Path, container: str):
    path = write(tmp_path / f"rows.{container}", RECORDS)
    assert read(path.rename(tmp_path / "rows.data")).container == container


def test_json_lines_under_a_json_name(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", RECORDS).rename(tmp_path / "rows.json")
    assert read(path).container == "jsonl"


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"text": "a"}\n  \n\n{"text": "b"}')
    assert read(path).records == [(2, {"text": "a"}), (5, {"text": "b"})]


def test_lists_of_turns_in_csv_are_written_as_json(tmp_path: Path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write(tmp_path / "rows.csv", [{"messages": json.dumps(turns), "id": "7"}])
    assert read(path).records == [(2, {"messages": turns, "id": "7"})]


def test_long_csv_cells_and_the_process_wide_limit(tmp_path: Path):
    before = csv.field_size_limit()
    path = write(tmp_path / "rows.csv", [{"text": "x" * 1_000_000}])
    assert len(read(path).records[0][1]["text"]) == 1_000_000
    assert csv.field_size_limit() == before


def test_a_missing_file_names_the_nearest(tmp_path: Path):
    write(tmp_path / "train.jsonl", RECORDS)
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        read(tmp_path / "trian.jsonl")


def test_a_folder_is_no_data_file(tmp_path: Path):
    with pytest.raises(DataError, match="regular file"):
        read(tmp_path)


def test_an_unknown_kind_lists_the_known_ones(tmp_path: Path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"\.parquet"):
        read(tmp_path / "rows.xlsx")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "rows.parquet", RECORDS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"gossamer\[data\]"):
        read(path)


def test_faults_list_twenty_and_count_the_rest():
    faults = RowFaults("rows.jsonl")
    for row in range(1, 31):
        faults.add(row, "wrong")
    with pytest.raises(DataError) as caught:
        faults.check("bad rows")
    assert "rows.jsonl:20: wrong" in str(caught.value)
    assert "rows.jsonl:21: wrong" not in str(caught.value)
    assert "and 10 more" in str(caught.value)


WRAPPED = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_wrapped_in_an_object_are_read_and_it_is_said(tmp_path: Path, indent: int | None, suffix: str):
    path = tmp_path / f"rows.{suffix}"
    path.write_text(json.dumps({"version": 1, "data": WRAPPED, "tags": ["x"]}, indent=indent))
    table = read(path)
    assert table.container == "json, the list 'data'"
    assert table.records == [(1, WRAPPED[0]), (2, WRAPPED[1])]


TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"train": WRAPPED, "test": WRAPPED}, "the file is one object with several lists: train, test"),
        (WRAPPED[0], "the file is one object with the fields prompt, completion"),
        ({"messages": TURNS}, "the file is one object with the fields messages"),
        ({"prompt": ["a"], "completion": ["b"]}, "the file is one object with the fields prompt, completion"),
        ({}, "no rows"),
    ],
)
def test_an_object_over_several_lines_is_one_error(tmp_path: Path, value: dict, reason: str):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value, indent=2) if value else "{\n}")
    with pytest.raises(DataError) as caught:
        read(path)
    assert reason in str(caught.value) or (not value and "fields of nothing" in str(caught.value))
    assert str(caught.value).count("\n  - ") == 1


@pytest.mark.parametrize("ends", ["", "]", ', "x": 1, "x": 2}'])
def test_pretty_printed_lines_and_broken_objects_are_one_error(tmp_path: Path, ends: str):
    path = tmp_path / "rows.jsonl"
    pretty = json.dumps(WRAPPED[0], indent=2)
    path.write_text(f"{pretty}\n" * 3 if not ends else pretty[:-2] + ends)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).count("\n  - ") == 1
    assert ends or "the object goes on for 4 lines" in str(caught.value)


def test_a_lone_row_on_one_line_is_a_row(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"messages": TURNS, "tools": [{"name": "f"}]}))
    assert read(path).records == [(1, {"messages": TURNS, "tools": [{"name": "f"}]})]
