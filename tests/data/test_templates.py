"""Chat templates in the shapes that are out there: whole turns, learned ends, one date."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from gossamer.data import clock
from gossamer.data.masks import encode, preview
from gossamer.data.rows import Chat, Completion, Instruction, Row, Turn
from gossamer.errors import DataError, Interrupted, SpecError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import RunConfig
from gossamer.training.dataset import EncodedDataset
from tests.data.dialects import byte_level, chat
from tests.training.toy_run import Watcher, fingerprint, toy_config, toy_train

ASK = "{% if add_generation_prompt %}"


class Shape(NamedTuple):
    """A template; where a turn begins in its text; what an answer ends with; whether it takes a system turn."""

    template: str
    begins: str
    end: str
    last_end: str = ""
    system: bool = True
    eos: str = "<|im_end|>"


def turns(head: str, tail: str, ask: str, *, first: str = "", eos: str = "<|im_end|>", **more: Any) -> Shape:
    """`head` and `tail` around every turn, with `ROLE` for the role."""
    quoted = json.dumps(head).replace("ROLE", '" + m["role"] + "')
    template = (
        f"{first}{{% for m in messages %}}{{{{ {quoted} + m['content'] + {json.dumps(tail)} }}}}{{% endfor %}}"
        f"{ASK}{{{{ {json.dumps(ask)} }}}}{{% endif %}}"
    )
    end = more.pop("end", tail.strip())
    return Shape(template, re.escape(head).replace("ROLE", "(system|user|assistant|model)"), end, eos=eos, **more)


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
TODAY = "{{ '<|start|>system\n' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
SHAPES = {
    "chatml": turns("<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "qwen, EOS of another name": turns("<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_start|>assistant\n", eos="<eos>"),
    "llama 3": turns("<|h|>ROLE<|/h|>\n\n", "<|eot|>", "<|h|>assistant<|/h|>\n\n", eos="<|eot|>",
                     first="{{ bos_token }}"),
    "llama 3.2": turns("<|h|>ROLE<|/h|>\n\n", "<|eot|>", "<|h|>assistant<|/h|>\n\n", eos="<|eot|>", first=(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '<|h|>system<|/h|>\n\nToday is ' + date_string + '<|eot|>' }}")),
    "gemma": turns("<turn>ROLE\n", "</turn>\n", "<turn>assistant\n", first=NO_SYSTEM, system=False, eos="</turn>"),
    "phi 3, EOS after the last": turns("<|ROLE|>\n", "<|end|>\n", "<|assistant|>\n", eos="<eos>"),
    "two ends at once": turns("<|im_start|>ROLE\n", "<|end|><eos>\n", "<|im_start|>assistant\n", eos="<eos>"),
    "two ends apart": turns("<|im_start|>ROLE\n", "<|end|>\n<eos>", "<|im_start|>assistant\n", eos="<eos>"),
    "zephyr": turns("<|ROLE|>\n", "</s>\n", "<|assistant|>\n", eos="</s>"),
    "deepseek, an end for answers only": Shape(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|assistant|>' }}{% endif %}",
        r"<\|(system|user|assistant)\|>", "<eos>", eos="<eos>"),
    "gpt-oss": turns("<|start|>ROLE<|message|>", "<|end|>", "<|start|>assistant<|message|>", first=TODAY, eos="<eos>"),
    "mistral": Shape(
        NO_SYSTEM + "{{ '<s>' }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
        r"\[INST\] ", "</s>", system=False, eos="</s>"),
    "cohere": turns("<|turn|><|ROLE|>", "<|/turn|>", "<|turn|><|assistant|>", first="{{ '<s>' }}", eos="<|/turn|>"),
    "granite": turns("<|role|>ROLE<|/role|>", "<eos>\n", "<|role|>assistant<|/role|>", eos="<eos>"),
    "exaone, old answers without a line": turns("[|ROLE|]", "[|end|]\n", "[|assistant|]", eos="[|end|]"),
}  # fmt: skip
SHAPES["phi 3, EOS after the last"] = SHAPES["phi 3, EOS after the last"]._replace(
    template=SHAPES["phi 3, EOS after the last"].template.replace("{% endif %}", "{% else %}{{ '<eos>' }}{% endif %}"),
    last_end="<|end|>\n<eos>",
)


def speaker(shape: Shape) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(shape.template, bos_token="<s>", eos_token=shape.eos)
    special = re.findall(r"</?\|?/?[a-z_]+\|?>|\[\|[a-z]+\|\]", shape.template + shape.end)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*special, shape.eos, "<|end|>", "<|eot|>"})})
    return tokenizer


def long_chat(shape: Shape, exchanges: int = 6) -> Row:
    texts = [f"{'question' if at % 2 == 0 else 'answer'} {at} {'x' * 20}." for at in range(2 * exchanges)]
    row = chat(*texts)
    system = (Turn("system", "Be brief and kind.", False),) if shape.system else ()
    return Chat(row.where, turns=(*system, *row.turns))


@pytest.mark.parametrize("name", SHAPES)
def test_every_answer_is_learned_with_its_end(name: str):
    shape, row = SHAPES[name], long_chat(SHAPES[name], 2)
    tokenizer = speaker(shape)
    (example,) = encode([row], tokenizer)
    learned = [text.strip() for text, on in preview(example, tokenizer) if on]
    first, last = row.turns[-3].text, row.turns[-1].text
    assert learned == [first + shape.end, last + (shape.last_end or shape.end)]
    if "<eos>" in shape.template and shape.eos == "<eos>":
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.supervised[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_truncation_leaves_whole_turns(name: str):
    """For every length: the chat without its earliest turns, with its system text, or a refusal."""
    shape = SHAPES[name]
    tokenizer, row = speaker(shape), long_chat(shape)
    (whole,) = encode([row], tokenizer, max_length=10_000)
    first = int(shape.system)
    wanted = {}
    for start in range(first, len(row.turns), 2):
        fewer = Chat(row.where, turns=(*row.turns[:first], *row.turns[start:]))
        wanted[start] = encode([fewer], tokenizer, max_length=10_000)[0].ids
    for length in range(20, len(whole) + 2, 17):
        fitting = [ids for ids in wanted.values() if len(ids) <= length]
        if not fitting:
            with pytest.raises(DataError, match="turns are not cut open"):
                encode([row], tokenizer, max_length=length, on_overlong="truncate")
            continue
        (example,) = encode([row], tokenizer, max_length=length, on_overlong="truncate")
        assert example.ids == fitting[0], "as few turns left out as it takes"
        text = str(tokenizer.decode(example.ids))
        assert re.search(shape.begins, text)
        assert ("Be brief and kind." in text) == shape.system


def test_a_system_turn_that_is_not_taken_gets_a_hint():
    row = Chat("f:1", turns=(Turn("system", "Be brief.", False), *chat("a", "b").turns))
    with pytest.raises(DataError) as caught:
        encode([row], speaker(SHAPES["gemma"]))
    assert "the template takes no system turn" in caught.value.hint


def test_a_prompt_written_by_a_template_is_not_cut():
    tokenizer = tiny_tokenizer()
    plain = Completion("f:1", prompt="p" * 90, completion="c")
    written = Completion("f:1", prompt="<|im_start|>user\n" + "p" * 90, completion="c")
    alpaca = Instruction("f:1", chat("a" * 90, "c"), Completion("f:1", "p" * 90, "c"))
    options: dict[str, Any] = {"max_length": 50, "on_overlong": "truncate"}
    assert len(encode([plain], tokenizer, **options)[0]) == 50
    for row in (written, alpaca):
        with pytest.raises(DataError, match="max_length is 50"):
            encode([row], tokenizer, **options, chat_template=False)


def test_the_hint_about_long_rows_names_what_is_not_set_yet():
    hints = {}
    for fate in ("error", "truncate"):
        with pytest.raises(DataError) as caught:
            encode(
                [Completion("f:1", prompt="a", completion="b" * 90)], tiny_tokenizer(), max_length=50, on_overlong=fate
            )
        hints[fate] = caught.value.hint
    assert hints["error"] == "raise max_length, or set overlong to drop or truncate"
    assert hints["truncate"].startswith("raise max_length, or set overlong to drop; ")


# What day it is ---------------------------------------------------------------------------------------------------

DATED = [name for name, shape in SHAPES.items() if "strftime_now" in shape.template]


@pytest.mark.parametrize("name", DATED)
def test_a_template_is_told_one_day(name: str):
    tokenizer, row = speaker(SHAPES[name]), chat("a", "b")
    then, later = (encode([row], tokenizer, date=day)[0] for day in ("2024-02-29", "2031-12-01"))
    assert re.search("2024-02-29|29 Feb 2024", str(tokenizer.decode(then.ids)))
    assert re.search("2031-12-01|01 Dec 2031", str(tokenizer.decode(later.ids)))
    assert tokenizer.chat_template == SHAPES[name].template, "the tokenizer's own is left alone"


@pytest.mark.parametrize(
    "start", ["", "\n", "  ", "\n\n  {% if true %}x{% endif %}\n", "  {%- if true %} x{% endif %}"]
)
@pytest.mark.parametrize("format", ["%d %b %Y", "%Y-%m-%d %H:%M:%S", "%A, %-d. %B", "week %V", "plain", "%d%d"])
def test_pinning_changes_nothing_but_the_day(start: str, format: str):
    template = f"{start}{{{{ 'is ' + strftime_now('{format}') + '<|im_end|>' }}}}\n"
    tokenizer = byte_level(template)
    asked = [{"role": "user", "content": "a"}]
    pinned = tokenizer.apply_chat_template(asked, tokenize=False, chat_template=clock.pinned(template, "2024-02-29"))
    moment = datetime(2024, 2, 29)
    tokenizer.chat_template = template.replace(f"strftime_now('{format}')", repr(moment.strftime(format)))
    assert pinned == tokenizer.apply_chat_template(asked, tokenize=False)


@pytest.mark.parametrize("chance", ["{{ [1, 2] | random }}", "{{ lipsum(1) }}", "{{ [[1]] | map('random') | join }}"])
def test_a_template_that_draws_is_refused(chance: str):
    with pytest.raises(DataError, match="draws random numbers"):
        encode([chat("a", "b")], byte_level(SHAPES["chatml"].template + chance))


def test_a_run_resumed_tomorrow_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": f"n {n}"}],
                                        "completion": [{"role": "assistant", "content": f"a {n}"}]}) + "\n"
                            for n in range(6)))  # fmt: skip
    tokenizer = speaker(SHAPES["gpt-oss"])
    monkeypatch.setattr("tests.training.toy_run.tiny_tokenizer", lambda: tokenizer)
    fields = {"data": rows, "epochs": 4, "batch_size": 2, "accumulation": 1}
    monkeypatch.setattr(clock, "today", lambda: "2030-01-01")
    toy_train(toy_config(tmp_path, output=tmp_path / "whole", **fields))

    def stop(step: int) -> None:
        if step == 5:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        toy_train(toy_config(tmp_path, **fields), progress=Watcher(stop))
    monkeypatch.setattr(clock, "today", lambda: "2030-01-02")
    seen = Watcher()
    toy_train(toy_config(tmp_path, **fields), resume=True, progress=seen)
    assert "the chat template writes a date; in this run, resumed or not, it is 2030-01-01" in seen.text
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    assert RunConfig.read(tmp_path / "run" / "config.yaml").data.date == "2030-01-01"


def test_the_day_is_a_setting(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("base: b\ndata: {train: t.jsonl, date: 2030-01-02}\noutput: o\n")
    assert RunConfig.read(tmp_path / "c.yaml").data.date == "2030-01-02"
    with pytest.raises(SpecError, match=r"data\.date.*must be a day such as 2026-12-31"):
        RunConfig.read(tmp_path / "c.yaml", ["--data.date=tomorrow"])


# Ends -------------------------------------------------------------------------------------------------------------


def test_ends_are_named_and_so_is_one_that_does_not_stop_generation(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [turn.message() for turn in chat("a", "b").turns]}) + "\n")
    config, model = toy_config(tmp_path, data=rows), tiny("llama")

    def said(shape: str) -> str:
        lines: list[str] = []
        EncodedDataset.read(config, speaker(SHAPES[shape]), lines.append, model=model)
        return "\n".join(lines)

    assert "answers are learned with the token they end with: <|im_end|>\n" in said("chatml") + "\n"
    assert "Generation does not stop at <|end|> but at " in said("gpt-oss")
    assert "does not stop" not in said("two ends at once")
