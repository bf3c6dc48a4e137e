"""Formats are found by their columns, and every row is what its format says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.data.formats import FORMATS, Rows, read_rows
from gossamer.data.rows import Chat, Completion, Row, Text, Turn, labels
from gossamer.errors import DataError
from tests.data.test_containers import write

CHAT = (Turn("system", "Be brief.", False), Turn("user", "Hi", False), Turn("assistant", "Hello!", True))
RECORDS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello!"},
        ]
    },
    "alpaca": {"instruction": "Add them.", "input": "1 2", "output": "3"},
    "prompt-completion": {"prompt": "1 + 2 =", "completion": " 3"},
    "text": {"text": "Once upon a time"},
}


def read(folder: Path, *records: object, format: str | None = None) -> Rows:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_rows(path, format=format)


@pytest.mark.parametrize("container", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_found_in_every_container(tmp_path: Path, name: str, container: str):
    record = RECORDS[name]
    if container == "csv":
        record = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
    rows = read_rows(write(tmp_path / f"rows.{container}", [record, record]))
    assert (rows.format, rows.container, len(rows)) == (name, container, 2)


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_chats(tmp_path: Path, name: str):
    (row,) = read(tmp_path, RECORDS[name])
    assert row == Chat(f"{tmp_path}/train.jsonl:1", turns=CHAT)
    assert row.label == "Hello!"


def test_prompt_and_completion(tmp_path: Path):
    (row,) = read(tmp_path, RECORDS["prompt-completion"])
    assert (row.prompt, row.completion, row.label) == ("1 + 2 =", " 3", " 3")


def test_text(tmp_path: Path):
    (row,) = read(tmp_path, RECORDS["text"])
    assert (row.text, row.label) == ("Once upon a time", "")


def test_alpaca_has_a_chat_and_a_plain_form(tmp_path: Path):
    with_input, without = read(tmp_path, RECORDS["alpaca"], {"instruction": "Count.", "input": "", "output": "1 2"})
    assert with_input.chat.turns == (Turn("user", "Add them.\n\n1 2", False), Turn("assistant", "3", True))
    assert with_input.plain.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd them.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert without.chat.turns[0].text == "Count."
    assert without.plain.prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nCount.\n\n### Response:"
    )
    assert without.plain.completion == "1 2"


def test_describe_is_one_line(tmp_path: Path):
    rows = read(tmp_path, *[RECORDS["prompt-completion"] | {"id": 1, "score": 0.5}] * 1200)
    assert rows.describe() == (
        f"{tmp_path}/train.jsonl: 1,200 rows of prompt/completion (jsonl); columns not used: id, score"
    )


def test_weights_switch_turns_off(tmp_path: Path):
    turns = [
        {"role": "user", "content": "Hi", "train": False},
        {"role": "assistant", "content": "Bad answer", "weight": 0},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Good answer", "weight": 1, "train": True},
    ]
    (row,) = read(tmp_path, {"messages": turns})
    assert [turn.supervised for turn in row.turns] == [False, False, False, True]


def test_parquet_nulls_are_absent_fields(tmp_path: Path):
    turns = [{"role": "user", "content": "Hi", "weight": None}, {"role": "assistant", "content": "Yo", "weight": 1}]
    (row,) = read_rows(write(tmp_path / "rows.parquet", [{"messages": turns}]))
    assert row.turns[1].supervised


def test_a_format_can_be_chosen(tmp_path: Path):
    record = {"prompt": "a", "completion": "b", "text": "c"}
    with pytest.raises(DataError, match=r"the columns fit prompt-completion and text") as caught:
        read(tmp_path, record)
    assert "format=" in caught.value.hint
    assert read(tmp_path, record, format="text").rows[0].text == "c"


def test_a_row_of_another_format_is_named(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, *[RECORDS["prompt-completion"]] * 2, RECORDS["messages"], RECORDS["prompt-completion"])
    assert "train.jsonl:3: a row of messages, but 3 of 4 rows are of prompt-completion" in str(caught.value)


def test_an_unknown_format_is_named_with_the_nearest(tmp_path: Path):
    with pytest.raises(DataError, match="did you mean 'sharegpt'"):
        read(tmp_path, RECORDS["sharegpt"], format="share-gpt")


def test_unknown_columns_list_what_is_known(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"promt": "a", "completion": "b"})
    shown = str(caught.value)
    assert "columns: promt, completion" in shown
    assert "alpaca: instruction, output" in shown
    assert "'promt': did you mean 'prompt'?" in shown


def test_labels_are_sorted_and_distinct():
    rows = [Completion("f:1", prompt="p", completion=label) for label in (" good", " bad", " good")]
    assert labels(rows) == (" bad", " good")


@pytest.mark.parametrize("rows", [[], [Completion("f:1", prompt="p", completion=" good")] * 3, [Text("f:1", text="t")]])
def test_one_label_is_no_classification(rows: list[Row]):
    with pytest.raises(DataError, match="two different labels"):
        labels(rows)
