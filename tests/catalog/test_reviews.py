"""The review table: grades at their exact borders, a fair split, and no line lost."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from gossamer.catalog.reviews import Sentence, clean, convert, grade, parse, row, split
from gossamer.errors import DownloadError


def archive(path: Path, table: bytes, member: str = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt") -> Path:
    """An archive of the real one's shape around `table`."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = len(table)
        tar.addfile(info, io.BytesIO(table))
    with tarfile.open(path, mode="w:gz") as tar:
        info = tarfile.TarInfo("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        info.size = len(inner.getvalue())
        tar.addfile(info, io.BytesIO(inner.getvalue()))
    return path


def made_up(documents: int, seed: int = 0) -> list[Sentence]:
    draw = random.Random(seed)
    return [
        Sentence(f"{document}_{index}", draw.uniform(-4, 4), f"sentence {document} {index}")
        for document in range(1, documents + 1)
        for index in range(1, draw.randint(2, 30))
    ]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        *[(-4.0, "terrible"), (-1.51, "terrible"), (-1.5, "bad"), (-0.36, "bad"), (-0.35, "neutral"), (0.0, "neutral")],
        *[(0.35, "neutral"), (0.36, "good"), (1.49, "good"), (1.5, "great"), (4.0, "great")],
    ],
)
def test_grades(score: float, expected: str) -> None:
    assert grade(score) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("at &amp;#38; t", "at & t"),
        (" at&amp;t ", "at&t"),
        ('"  this\tproblem', '" this problem'),
        ("!", "!"),
        ("a < b & c", "a < b & c"),
    ],
)
def test_clean(raw: str, expected: str) -> None:
    assert clean(raw) == expected == clean(expected)


def test_rows_read_naturally() -> None:
    assert row(Sentence("12_3", 1.5, "i love it!")) == {
        "prompt": "Review: i love it!\nSentiment:",
        "completion": " great",
        "id": "12_3",
    }


def test_parse() -> None:
    assert parse("1_1\t-0.35\tfine.\r\n1_2\t3\tat&amp;t") == [
        Sentence("1_1", -0.35, "fine."),
        Sentence("1_2", 3.0, "at&t"),
    ]


@pytest.mark.parametrize("line", ["1_1\t0.5", "1_1\tgood\ttext", "x_1\t0.5\ttext", "1_1\t0.5\t ", "1_1\t0.5\ta\tb", ""])
def test_an_odd_line_is_an_error_with_its_number(line: str) -> None:
    with pytest.raises(DownloadError) as caught:
        parse(f"1_1\t0.5\tfine\r\n{line}\r\n1_2\t0.5\tfine")
    assert caught.value.where.endswith(":2")


def test_split_is_by_document_and_of_its_size() -> None:
    sentences = made_up(60)
    held_out = split(sentences)
    share = sum(one.document in held_out for one in sentences) / len(sentences)
    assert 0.17 < share <= 0.2
    assert held_out == split(list(reversed(sentences))), "the order does not matter"
    assert held_out != split(sentences, seed=1)


def test_documents_that_share_a_sentence_stay_together() -> None:
    sentences = made_up(60)
    shared = [Sentence("1_99", 0.0, "same"), Sentence("7_99", 0.0, "same")]
    shared += [Sentence("7_98", 0.0, "other"), Sentence("30_98", 0.0, "other")]
    for seed in range(8):
        held_out = split(sentences + shared, seed=seed)
        assert len({document in held_out for document in ("1", "7", "30")}) == 1


def test_convert_uses_every_line(tmp_path: Path) -> None:
    sentences = made_up(40)
    table = "\r\n".join(f"{one.id}\t{one.score:.2f}\t{one.text}" for one in sentences)
    notes = convert(archive(tmp_path / "sdist.tar.gz", table.encode()), tmp_path)
    lines = [(tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "eval")]
    train, held_out = ([json.loads(line) for line in part] for part in lines)
    assert sorted(one["id"] for one in train + held_out) == sorted(one.id for one in sentences)
    assert notes["rows"] == len(sentences)
    assert notes["dropped"] == 0
    assert notes["train"]["rows"] == len(train)
    assert sum(notes["eval"]["grades"].values()) == len(held_out)
    assert [one["id"] for one in train] == [one.id for one in sentences if one.id in {row["id"] for row in train}]


def test_archives_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="review table"):
        convert(archive(tmp_path / "other.tar.gz", b"", member="something/else.txt"), tmp_path)
    (tmp_path / "cut.tar.gz").write_bytes(archive(tmp_path / "whole.tar.gz", b"1_1\t0\tx" * 999).read_bytes()[:200])
    with pytest.raises(DownloadError, match="review table"):
        convert(tmp_path / "cut.tar.gz", tmp_path)
    (tmp_path / "not.tar.gz").write_bytes(b"hello")
    with pytest.raises(DownloadError, match="review table"):
        convert(tmp_path / "not.tar.gz", tmp_path)
