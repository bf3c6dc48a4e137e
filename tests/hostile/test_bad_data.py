"""Bad data files: every fault comes back as one `DataError` with file, row and reason, and exit code 2."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.data.batches import collate
from gossamer.data.containers import LONGEST_LINE
from gossamer.data.formats import read_rows
from gossamer.data.masks import Example, encode
from gossamer.data.rows import labels
from gossamer.errors import DataError
from gossamer.models import tiny_tokenizer

GOOD = b'{"prompt": "a", "completion": "b"}\n'
CHAT = '{"messages": [{"role": "user", "content": "Hi"}, %s]}'
ANSWER = '{"role": "assistant", "content": "Hello"}'


def refusal(folder: Path, content: bytes, name: str = "train.jsonl") -> str:
    """The message that a file with this content is refused with."""
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


# Bytes and syntax: the second line of three is bad ----------------------------------------------------------------

LINES = {
    "cut off in a text": (b'{"prompt": "a", "comple', "Unterminated string starting, column 17 (the text is cut off)"),
    "cut off after a comma": (b'{"prompt": "a",', "(the text is cut off)"),
    "cut off in the object": (b'{"prompt": "a"', "(the text is cut off)"),
    "missing comma": (b'{"prompt": "a" "completion": "b"}', "not valid JSON: Expecting ',' delimiter, column 16"),
    "single quotes": (b"{'prompt': 'a', 'completion': 'b'}", "not valid JSON: Expecting property name"),
    "two objects": (GOOD.strip() * 2, "not valid JSON: Extra data, column 35"),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "b"}', "byte 0xe9 at offset 50 of the file is not UTF-8"),
    "half a character": (b'{"prompt": "\xf0\x9f\x99", "completion": "b"}', "byte 0xf0 at offset 47"),
    "a NUL byte": (b'{"prompt": "a\0", "completion": "b"}', "NUL byte at offset 48 of the file"),
    "an escaped NUL": (b'{"prompt": "a\\u0000", "completion": "b"}', "'prompt' holds a NUL character at position 1"),
    "a raw line break code": (b'{"prompt": "a\x0bb", "completion": "b"}', "Invalid control character"),
    "half a surrogate pair": (b'{"prompt": "a\\ud83d", "completion": "b"}', "half a surrogate pair at position 1"),
    "a key twice": (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "the key 'prompt' is given twice"),
    "a nested key twice": (b'{"prompt": "a", "completion": "b", "m": {"x": 1, "x": 2}}', "the key 'x' is given twice"),
    "NaN": (b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is not JSON"),
    "a number with 5,000 digits": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "integer string conversion"),
    "a list": (b'["a", "b"]', "a row is an object with named fields; got a list"),
    "a text": (b'"a"', "got text"),
    "null": (b"null", "got null"),
    "a number": (b"3.5", "got float 3.5"),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    "a huge line": (b'{"prompt": "' + b"x" * LONGEST_LINE + b'"}', "the line holds 16,777,231 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LINES)
def test_a_bad_line_is_named(tmp_path: Path, fault: str):
    line, reason = LINES[fault]
    shown = refusal(tmp_path, GOOD + line + b"\n" + GOOD)
    assert reason in shown.split("train.jsonl:2: ")[1]
    assert shown.count("\n  - ") == 1, "one fault, one line"


# Fields -----------------------------------------------------------------------------------------------------------

FIELDS = {
    "missing": ('{"prompt": "a"}', "'completion' is missing; found prompt"),
    "misspelt": ('{"prompt": "a", "completoin": "b"}', "'completion' is missing; found prompt, completoin"),
    "null": ('{"prompt": "a", "completion": null}', "'completion' is null"),
    "empty": ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
    "blank": ('{"prompt": " \\n", "completion": "b"}', "'prompt' is empty"),
    "a number": ('{"prompt": "a", "completion": 3}', "'completion' must be text, got int 3"),
    "a flag": ('{"prompt": "a", "completion": true}', "'completion' must be text, got true or false"),
    "a list": ('{"prompt": ["a"], "completion": "b"}', "'prompt' must be text, got a list"),
    "nothing": ("{}", "'prompt' is missing; found no fields"),
}


@pytest.mark.parametrize("fault", FIELDS)
def test_a_bad_field_is_named(tmp_path: Path, fault: str):
    line, reason = FIELDS[fault]
    assert f"train.jsonl:2: {reason}" in refusal(tmp_path, GOOD + line.encode() + b"\n" + GOOD)


CHATS = {
    "not a list": ('{"messages": "oops"}', "'messages' must be a list of turns, got text"),
    "an object": ('{"messages": {"role": "user"}}', "'messages' must be a list of turns, got an object"),
    "an empty list": ('{"messages": []}', "'messages' must be a list of turns, got an empty list"),
    "null": ('{"messages": null}', "'messages' is null"),
    "missing": ('{"message": []}', "'messages' is missing; found message"),
}
TURNS = {
    "a text": ('"Hello"', "turn 2: must be an object, got text"),
    "role null": ('{"role": null, "content": "a"}', "turn 2: 'role' is null"),
    "role missing": ('{"content": "a"}', "turn 2: 'role' is missing; found content"),
    "role misspelt": ('{"role": "asistant", "content": "a"}', "unknown role 'asistant'; did you mean 'assistant'?"),
    "role of a tool": ('{"role": "tool", "content": "a"}', "turn 2: unknown role 'tool'"),
    "role a number": ('{"role": 1, "content": "a"}', "turn 2: 'role' must be text, got int 1"),
    "content empty": ('{"role": "assistant", "content": ""}', "turn 2: 'content' is empty"),
    "content null": ('{"role": "assistant", "content": null}', "turn 2: 'content' is null"),
    "content in parts": ('{"role": "assistant", "content": [{}]}', "turn 2: 'content' must be text, got a list"),
    "a tool call": ('{"role": "assistant", "content": "a", "tool_calls": [{}]}', "turn 2: 'tool_calls' would be lost"),
    "no assistant": ('{"role": "user", "content": "a"}', "no assistant turn, so there is nothing to learn"),
    "half a weight": ('{"role": "assistant", "content": "a", "weight": 0.5}', "must be 0 or 1, got float 0.5"),
    "switched off": ('{"role": "assistant", "content": "a", "weight": 0}', "every assistant turn is switched off"),
    "a user to learn": ('{"role": "user", "content": "a", "train": true}', "turn 2: only assistant turns are learned"),
}
CHATS |= {f"turn: {fault}": (CHAT % turn, reason) for fault, (turn, reason) in TURNS.items()}


@pytest.mark.parametrize("fault", CHATS)
def test_a_bad_turn_is_named(tmp_path: Path, fault: str):
    line, reason = CHATS[fault]
    shown = refusal(tmp_path, "\n".join([CHAT % ANSWER, line, CHAT % ANSWER]).encode())
    assert reason in shown.split("train.jsonl:2: ")[1]
    assert shown.count("\n  - ") == 1


def test_a_bad_sharegpt_role_offers_sharegpt_names(tmp_path: Path):
    shown = refusal(tmp_path, b'{"conversations": [{"from": "humn", "value": "a"}, {"from": "gpt", "value": "b"}]}')
    assert "train.jsonl:1: turn 1: unknown role 'humn'; did you mean 'human'" in shown


# Whole files ------------------------------------------------------------------------------------------------------

FILES = {
    "empty": ("train.jsonl", b"", "the file holds no rows"),
    "blank": ("train.jsonl", b"\n \r\n\n", "the file holds no rows"),
    "only a mark": ("train.jsonl", b"\xef\xbb\xbf", "the file holds no rows"),
    "empty array": ("train.json", b" [ ] ", "the file holds no rows"),
    "empty csv": ("train.csv", b"prompt,completion\n", "the file holds no rows"),
    "rows without fields": ("train.jsonl", b"{}\n{}\n", "columns: none"),
    "UTF-16": ("train.jsonl", GOOD.decode().encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without mark": ("train.jsonl", GOOD.decode().encode("utf-16-le"), "got:      UTF-16 or UTF-32"),
    "UTF-16 csv": ("train.csv", "prompt,completion\na,b\n".encode("utf-16-be"), "the file is not UTF-8"),
    "UTF-32 array": ("train.json", "[{}]".encode("utf-32"), "the file is not UTF-8"),
    "array cut off": ("train.json", b"[" + GOOD.strip() + b",\n" + GOOD[:20], "train.json:2: not valid JSON"),
    "array without end": ("train.json", b"[" + GOOD, "train.json:1: after this row comes 'the end of the file'"),
    "array without comma": ("train.json", b"[" + GOOD * 2 + b"]", "train.json:1: after this row comes '{'"),
    "array and more": ("train.json", b"[" + GOOD + b"] x", "train.json:1: the file goes on after the array"),
    "array with a trailing comma": ("train.json", b"[" + GOOD + b",]", "train.json:2: not valid JSON: Expecting value"),
    "array of lists": ("train.json", b"[" + GOOD + b', ["a"]]', "train.json:2: a row is an object"),
    "array nested deeply": ("train.json", b"[" * 100_000, "train.json:1: the JSON is nested too deeply"),
    "a number": ("train.json", b"3", "a .json data file holds an array of objects"),
    "csv with a short row": ("train.csv", b"prompt,completion\na,b\nc\n", "train.csv:3: 1 fields, but the header"),
    "csv with a long row": ("train.csv", b"prompt,completion\na,b,c\n", "train.csv:2: 3 fields, but the header"),
    "csv with an open quote": ("train.csv", b'prompt,completion\na,b\n"c,d\n', "train.csv:3: not valid CSV"),
    "csv with a stray quote": ("train.csv", b'prompt,completion\n"a"x,b\nc,d\n', "train.csv:2: not valid CSV"),
    "csv with a column twice": ("train.csv", b"prompt,prompt\na,b\n", "train.csv:1: the header names a column twice"),
    "csv in Latin-1": ("train.csv", b"prompt,completion\na,\xe9\n", "train.csv:2: byte 0xe9 at offset 20"),
    "csv with broken turns": ("train.csv", b'messages\n"[{"\n', "train.csv:2: column 'messages': not valid JSON"),
    "parquet in name only": ("train.parquet", GOOD, "not a readable Parquet file"),
    "parquet cut off": ("train.parquet", b"PAR1\x00\x00", "not a readable Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_a_bad_file_is_refused(tmp_path: Path, fault: str):
    name, content, reason = FILES[fault]
    assert reason in refusal(tmp_path, content, name)


def test_a_damaged_parquet_file_is_refused_wherever_it_is_cut(tmp_path: Path):
    path = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 10), path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 37):
        refusal(tmp_path, whole[:end], "train.parquet")


def test_parquet_rows_are_named_too(tmp_path: Path):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(DataError, match=r"train\.parquet:2: 'text' is null"):
        read_rows(path)


def test_all_faults_of_a_file_come_at_once(tmp_path: Path):
    """Unreadable rows and unusable ones, together; twenty are shown, all are counted."""
    bad = [b'{"prompt": "a"', b"\xe9", b'{"prompt": "a"}', b'{"prompt": "a", "completion": 1}', b"[]"]
    shown = refusal(tmp_path, GOOD + b"\n".join(bad) + b"\n" + GOOD)
    assert all(f"train.jsonl:{row}: " in shown for row in (2, 3, 4, 5, 6))
    shown = refusal(tmp_path, GOOD + b"{}\n" * 1000)
    assert shown.count("\n  - train.jsonl") == 0
    assert shown.count("'prompt' is missing") == 20
    assert "and 980 more" in shown


def test_a_hundred_megabytes_in_one_line(tmp_path: Path):
    start = time.process_time()
    shown = refusal(tmp_path, b'{"prompt": "' + b"x" * 100_000_000)
    assert "train.jsonl:1: the line holds 100,000,012 bytes" in shown
    assert time.process_time() - start < 5


@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", "parquet", "data"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        read_rows(path)


KEYS = ["messages", "conversations", "role", "content", "from", "value", "weight", "train", "prompt", "completion",
        "text", "instruction", "input", "output"]  # fmt: skip
JSON = st.recursive(
    st.sampled_from(
        ["user", "assistant", "human", "gpt", "a", " ", "", "\0", "\ud800", None, True, 0, 1, 0.5, -(10**30)]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), min_size=1, max_size=4))
def test_any_json_is_read_or_refused_and_what_is_read_can_be_trained_on(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict]
):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    with contextlib.suppress(DataError):
        examples = encode(read_rows(path), tiny_tokenizer())
        assert collate(list(examples), pad_id=0).supervised > 0


# Sets that cannot teach -------------------------------------------------------------------------------------------


def test_one_class_is_no_classification(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(GOOD * 10)
    with pytest.raises(DataError, match="at least two different labels"):
        labels(read_rows(tmp_path / "train.jsonl"))


def test_a_batch_without_labels_is_an_error_and_not_a_loss_of_zero():
    with pytest.raises(DataError, match=r"nothing in this batch is supervised[\s\S]*f:7"):
        collate([Example([1, 2, 3], [False] * 3, "f:7")], pad_id=0)


def test_a_changed_file_has_another_digest(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD * 10)
    before = read_rows(path).digest
    path.write_bytes(GOOD * 9 + GOOD.replace(b'"b"', b'"c"'))
    assert read_rows(path).digest != before
