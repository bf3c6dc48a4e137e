"""No column is lost: it changes what is learned, or is named as unused, or its row is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.data.columns import HISTORY, REFUSED, SYSTEM, TOOLS, is_empty
from gossamer.data.formats import Rows, read_rows
from gossamer.data.masks import encode
from gossamer.data.rows import Turn, labels
from gossamer.errors import DataError
from tests.data.dialects import TOY, byte_level

KNOWS_TOOLS = byte_level(
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + (call['function'] | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"town": {"type": "string"}}}}}
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    "alpaca": {"instruction": "Hi", "output": "Yo"},
    "prompt-completion": {"prompt": "Hi", "completion": " Yo"},
    "conversational": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Yo"}],
    },
    "text": {"text": "Hi Yo"},
}
VALUES: dict[str, Any] = {
    **dict.fromkeys(SYSTEM, "Answer as a pirate."),
    **{name: [TOOL] for name in TOOLS},
    **{name: [["Before?", "After."]] for name in HISTORY},
    **dict.fromkeys(("label", "kto_tag", "desirable", "is_desirable", "accepted", "is_chosen", "train"), False),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "importance"), 0.5),
}
MEANINGLESS = ("id", "source", "metadata", "score", "split", "url", "lang", "created_at", "num_tokens", "file",
               "files", "anything")  # fmt: skip
COLUMNS = (*dict.fromkeys((*(name for one in REFUSED for name in one.names), "Images", "image-url", "System"
                           )), *MEANINGLESS)  # fmt: skip


def read(folder: Path, *records: dict[str, Any]) -> Rows:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_rows(path)


def refusal(folder: Path, *records: dict[str, Any]) -> str:
    """What the rows are refused with; `""` if they are read."""
    try:
        read(folder, *records)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("format", FORMATS)
def test_every_column_is_used_or_named_or_refused(tmp_path: Path, format: str):
    plain = FORMATS[format]
    (bare,) = encode(read(tmp_path, plain), KNOWS_TOOLS)
    for column in COLUMNS:
        row = plain | {column: VALUES.get(column, VALUES.get(column.lower(), "something"))}
        if refused := refusal(tmp_path, plain, row):
            assert f"train.jsonl:2: {column!r}" in refused
            assert "  hint: " in refused or "lists of turns" in refused
            assert column not in MEANINGLESS
            continue
        rows = read(tmp_path, plain, row)
        (_, changed) = encode(rows, KNOWS_TOOLS)
        metadata = format == "text" and column in ("label", "input", "context", "prefix", "contexts", "document",
                                                   "documents", "passage", "passages")  # fmt: skip
        if column in MEANINGLESS or metadata or column == "input" != format:
            assert (changed.ids == bare.ids) == (column in rows.unused), column
        else:
            assert changed.ids != bare.ids, column
            assert column not in rows.unused


@pytest.mark.parametrize("switch", ["train", "weight"])
def test_a_prompts_turn_that_asks_to_be_learned_is_refused(tmp_path: Path, switch: str):
    """Of a prompt and a completion that are turns the second is learned; the first may say that it is not."""
    record, prompt = FORMATS["conversational"], [{"role": "user", "content": "Hi"}]
    before = [*prompt, {"role": "assistant", "content": "Hm", switch: False}, *prompt]
    assert len(read(tmp_path, record | {"prompt": before})) == 1
    before[1][switch] = True
    with pytest.raises(DataError, match=r"train\.jsonl:1: 'prompt': turn 2 asks to be learned.* 'messages'"):
        read(tmp_path, record | {"prompt": before})


@pytest.mark.parametrize("value", [None, "", " ", [], {}, [None], {"path": None}, [{"bytes": None, "path": ""}]])
def test_an_empty_column_is_harmless(tmp_path: Path, value: Any):
    assert is_empty(value)
    for plain in FORMATS.values():
        bare, *rows = read(tmp_path, plain, *(plain | {column: value} for column in COLUMNS))
        assert all([*row.texts()] == [*bare.texts()] for row in rows)
        assert all(getattr(row, "turns", ()) == getattr(bare, "turns", ()) for row in rows)


def test_marks_that_say_yes_are_harmless(tmp_path: Path):
    record = FORMATS["prompt-completion"]
    assert len(read(tmp_path, *({**record, "label": good} for good in (True, "True", 3, "good")))) == 4
    assert len(read(tmp_path, *({**record, "weight": one} for one in (1, 1.0, True, "1")))) == 4
    with pytest.raises(DataError, match=r"train\.jsonl:1: 'label' would be lost"):
        read(tmp_path, record | {"label": "False"})


def test_a_placeholder_without_its_picture_is_refused(tmp_path: Path):
    seen = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Yo"}]}
    assert len(read(tmp_path, seen)) == 1, "HTML, for all that can be known"
    with pytest.raises(DataError, match=r"train\.jsonl:1: the text holds <image>"):
        read(tmp_path, seen | {"images": []})


def test_system_texts_come_first_and_once(tmp_path: Path):
    system, chat = {"system": "Be brief."}, FORMATS["messages"]
    (row,) = read(tmp_path, chat | system)
    assert row.turns[0] == Turn("system", "Be brief.", False)
    named = {"messages": [{"role": "developer", "content": "Be brief."}, *chat["messages"]]}
    assert read(tmp_path, named | system).rows[0].turns == row.turns
    with pytest.raises(DataError, match=r"'system' and the system turn say different things"):
        read(tmp_path, named | {"system": "Be long."})
    with pytest.raises(DataError, match=r"'system' and 'system_prompt' mean the same"):
        read(tmp_path, chat | system | {"system_prompt": "Be brief."})


def test_alpaca_has_a_place_for_a_system_text_and_for_earlier_turns(tmp_path: Path):
    (row,) = read(tmp_path, FORMATS["alpaca"] | {"system": "Be brief."})
    assert row.plain.prompt == "Be brief.\n\n### Instruction:\nHi\n\n### Response:"
    assert [turn.role for turn in row.chat.turns] == ["system", "user", "assistant"]
    (row,) = read(tmp_path, FORMATS["alpaca"] | {"history": [["a", "b"], ["c", "d"]]})
    assert [(turn.text, turn.supervised) for turn in row.turns] == [
        ("a", False), ("b", True), ("c", False), ("d", True), ("Hi", False), ("Yo", True),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no chat template in use"):
        encode([row], byte_level(None))
    with pytest.raises(DataError, match=r"'history': entry 1 must be \[question, answer\]"):
        read(tmp_path, FORMATS["alpaca"] | {"history": ["a"]})


def test_lists_in_a_csv_file_are_json(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output,history\nHi,Yo,"[[""a"", ""b""]]"\nHi,Yo,\n')
    with_history, without = read_rows(path)
    assert [turn.text for turn in with_history.turns] == ["a", "b", "Hi", "Yo"]
    assert len(without.chat.turns) == 2


@pytest.mark.parametrize("written", [json.dumps, str])
@pytest.mark.parametrize("column", ["prompt", "text"])
def test_turns_written_into_a_cell_are_no_text(tmp_path: Path, column: str, written: Any):
    cell = written([{"role": "user", "content": "Hi"}])
    with pytest.raises(DataError, match=f"'{column}' holds a list of turns as text"):
        read(tmp_path, {column: cell} | ({"completion": "Yo"} if column == "prompt" else {}))


@pytest.mark.parametrize("column", ["image_2", "images1", "rejected_messages", "chosen_answer", "Chosen Response"])
def test_relatives_of_a_column_mean_the_same(tmp_path: Path, column: str):
    with pytest.raises(DataError, match=rf"train\.jsonl:1: '{column}' would be lost"):
        read(tmp_path, FORMATS["messages"] | {column: "something"})


# Turns ------------------------------------------------------------------------------------------------------------


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"} | fields]}


TURN_FIELDS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content", "reasoning",
               "thinking", "images", "tool_call_id", "prefix", "loss_mask")  # fmt: skip


@pytest.mark.parametrize("field", TURN_FIELDS)
def test_a_field_of_a_turn_is_harmless_only_when_empty(tmp_path: Path, field: str):
    for empty in (None, "", [], {}):
        assert read(tmp_path, turn(**{field: empty})).rows[0].turns[-1] == Turn("assistant", "Yo", True)
    if field != "tool_call_id":
        with pytest.raises(DataError, match=rf"train\.jsonl:1: turn 2: '{field}' would be lost"):
            read(tmp_path, turn(**{field: ["something"]}))


def test_parts_are_joined_if_all_of_them_are_text(tmp_path: Path):
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}]
    assert read(tmp_path, turn(content=parts)).rows[0].turns[1].text == "ab"
    for bad, reason in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "part 3 is of type 'image_url', which is not read yet"),
        ({"type": "input_audio", "input_audio": {}}, "of type 'input_audio'"),
        ({"type": "text"}, "part 3 has no text"),
        ("a", "part 3 has no text"),
        ({"type": "text", "text": "c", "annotations": [{"url": "x"}]}, "part 3 has 'annotations', which would be lost"),
    ):
        refused = refusal(tmp_path, turn(content=[*parts, bad]))
        assert "train.jsonl:1: turn 2: 'content' must be text, got a list whose part 3" in refused
        assert reason in refused


def test_an_empty_system_turn_says_nothing(tmp_path: Path):
    for empty in ("", " \n", None):
        chat = [{"role": "system", "content": empty}, *FORMATS["messages"]["messages"]]
        assert len(read(tmp_path, {"messages": chat}).rows[0].turns) == 2


def test_names_are_told_to_the_template_and_counted_where_it_drops_them(tmp_path: Path):
    rows = read(tmp_path, {"messages": [{"role": "user", "content": "Hi", "name": "kim"}, turn()["messages"][1]]})
    encoding = encode(rows, TOY)
    assert encoding.describe().endswith("; 1 rows with a name that the chat template does not write")
    writes = byte_level(str(TOY.chat_template).replace("message['role']", "message['role'] + (message.name or '')"))
    assert encode(rows, writes).notes == ()


def test_tools_are_written_and_calls_are_learned(tmp_path: Path):
    chat = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "21 degrees"},
        {"role": "assistant", "content": "Yes, 21."},
    ]
    rows = read(tmp_path, {"messages": chat, "tools": json.dumps([TOOL])})
    (example,) = encode(rows, KNOWS_TOOLS)
    said = KNOWS_TOOLS.decode([id for id, on in zip(example.ids, example.supervised, strict=True) if on])
    assert said == ('<call>{"name": "weather", "arguments": {"town": "Ulm"}}</call><|im_end|>Yes, 21.<|im_end|>')
    assert "properties" in KNOWS_TOOLS.decode(example.ids)
    for record, reason in (({"messages": chat}, "does not write all of the tool calls"),
                           (turn() | {"tools": [TOOL]}, "does not write the tools; 'weather'")):  # fmt: skip
        with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{reason}"):
            encode(read(tmp_path, record), TOY)


def test_a_call_that_is_not_learned_is_not_dropped_either(tmp_path: Path):
    chat = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "Yes."},
    ]
    with pytest.raises(DataError, match="turn 2: the chat template does not write the call of 'weather'"):
        encode(read(tmp_path, {"messages": chat}), TOY)


@pytest.mark.parametrize("calls", [[1], [{}], [{"function": {"name": ""}}], "call", [CALL | {"function": {
    "name": "f", "arguments": "{"}}], [CALL | {"function": {"name": "f", "arguments": "[1]"}}]])  # fmt: skip
def test_calls_that_cannot_be_read_are_refused(tmp_path: Path, calls: Any):
    with pytest.raises(DataError, match=r"turn 2: 'tool_calls' would be lost: "):
        read(tmp_path, turn(tool_calls=calls))


def test_a_template_that_drops_a_turn_is_refused(tmp_path: Path):
    """A system text that the template never writes would teach the answers without it."""
    silent = byte_level(
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"turn 1: the chat template does not write the system turn"):
        encode(read(tmp_path, FORMATS["messages"] | {"system": "As a pirate."}), silent)


# Hints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ("question answer", "rename 'question' to 'prompt'; rename 'answer' to 'completion'"),
        ("Query Response", "rename 'Query' to 'prompt'; rename 'Response' to 'completion'"),
        ("input output", "rename 'input' to 'prompt'; rename 'output' to 'completion'"),
        ("source target", "rename 'source' to 'prompt'; rename 'target' to 'completion'"),
        ("human bot", "rename 'human' to 'prompt'; rename 'bot' to 'completion'"),
        ("instruction response", "rename 'response' to 'output'"),
        ("sentence label", "rename 'sentence' to 'prompt'; rename 'label' to 'completion'"),
        ("content", "rename 'content' to 'text'"),
        ("dialogue", "rename 'dialogue' to 'messages'"),
        ("TEXT", "'TEXT': did you mean 'text'?"),
        ("Prompt Completion", "'Prompt': did you mean 'prompt'?; 'Completion': did you mean 'completion'?"),
        ("alpha beta", ""),
    ],
)
def test_a_hint_helps_or_is_not_given(tmp_path: Path, columns: str, hint: str):
    with pytest.raises(DataError) as caught:
        read(tmp_path, dict.fromkeys(columns.split(), "a"))
    assert caught.value.hint == hint


def test_a_preference_pair_is_called_one(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "a preference is not what sft learns" in caught.value.hint
    assert "completion" not in caught.value.hint


def test_text_and_label_are_told_what_a_classifier_reads(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        labels(read(tmp_path, {"text": "a", "label": "b"}, {"text": "c", "label": "d"}))
    assert "name the column of the text 'prompt' and that of the label 'completion'" in caught.value.hint
