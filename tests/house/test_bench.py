"""The measuring tools: fair order, true summaries, a page that shows what was written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import common, evaluation, numbers
from gossamer.models import tiny, tiny_tokenizer


def test_contenders_take_turns():
    calls: list[str] = []
    timings = common.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert all(0 <= one.min <= one.median <= one.max for one in timings.values())


def test_a_timing_as_columns():
    assert common.Timing(0.001, 0.002, 0.0035).row() == {"min ms": 1.0, "median ms": 2.0, "max ms": 3.5}
    assert common.Timing(1, 2, 3).row("s") == {"min s": 1, "median s": 2, "max s": 3}


def test_a_result_reaches_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    results, page = tmp_path / "results", tmp_path / "numbers.md"
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(results / "toy.json")])
    rows = [{"contender": "base", "median ms": 1234.5678, "rows": 12000}, {"contender": "a|b", "exact": True}]
    common.report("toy", "How fast is a toy?", lambda: rows, notes="Only a toy.")
    assert "contender: base" in capsys.readouterr().out

    written = json.loads((results / "toy.json").read_text())
    assert {"name", "question", "command", "machine", "date", "rows", "notes"} == set(written)
    assert {"cpu", "cores", "torch", "transformers", "peft", "commit"} <= set(written["machine"])

    numbers.main(results, page)
    text = page.read_text()
    assert text.startswith(numbers.HEADER)
    assert "## How fast is a toy?" in text
    assert "Only a toy." in text
    assert "| contender | median ms | rows | exact |\n| --- | --- | --- | --- |\n| base | 1,235 | 12,000 |  |\n" in text
    assert "| a\\|b |  |  | True |" in text
    assert "python -m bench.toy" in text

    numbers.main(tmp_path / "nowhere", page)
    assert page.read_text() == text, "what was measured on another machine stays"


def test_the_page_without_results(tmp_path: Path):
    numbers.main(tmp_path, tmp_path / "numbers.md")
    assert (tmp_path / "numbers.md").read_text() == numbers.HEADER + numbers.EMPTY


def test_evaluations_agree_before_they_are_timed(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny("llama").eval(), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    lines = [{"prompt": "word " * (1 + 7 * (at % 3)), "completion": "ab"[at % 2]} for at in range(20)]
    rows = evaluation.compared(model, tokenizer, "toy", lines, rounds=1)
    assert [row["contender"] for row in rows] == ["padded in order", "padded, sorted by length", "Gossamer"]
    monkeypatch.setattr(evaluation, "ours", lambda *_: (0.5, 0.0))
    with pytest.raises(AssertionError, match="finds a"):
        evaluation.compared(model, tokenizer, "toy", lines, rounds=1)
