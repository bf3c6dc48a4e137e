"""The `reviews` data set: sentences of product reviews with the mean of twenty people's scores from -4 to 4.

Source: Hutto and Gilbert 2014 (VADER, ICWSM), who scored the reviews of Hu and Liu 2004; their
`amazonReviewSnippets_GroundTruth.txt` holds 3,708 lines `document_sentence <tab> score <tab> text`.

The scores become five grades, each one token after the prompt:

    terrible < -1.5 <= bad < -0.35 <= neutral <= 0.35 < good < 1.5 <= great

The split is by document, so that no reviewer is in both parts. Documents that share a sentence ("i love it!") stay
together, so that no sentence is in both parts either.
"""

import hashlib
import html
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import DownloadError
from gossamer.files.atomic import write_text

GRADES = ("terrible", "bad", "neutral", "good", "great")
EVAL_SHARE = 0.2
SPLIT_SEED = 0

_OUTER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
_LARGEST_TABLE = 16 << 20


class Sentence(NamedTuple):
    """One scored sentence: "12_3" is the third of document 12."""

    id: str
    score: float
    text: str

    @property
    def document(self) -> str:
        """The review it comes from."""
        return self.id.split("_")[0]


def convert(archive: Path, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl` and `eval.jsonl` from the source archive; returns counts for the manifest.

    Raises `DownloadError` when the archive does not hold the table as it was.
    """
    sentences = parse(_table(archive))
    held_out = split(sentences)
    parts = {
        "train": [sentence for sentence in sentences if sentence.document not in held_out],
        "eval": [sentence for sentence in sentences if sentence.document in held_out],
    }
    for name, part in parts.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row(one), ensure_ascii=False) + "\n" for one in part))
    return {
        "rows": len(sentences),
        "dropped": 0,
        "split": {"by": "document", "seed": SPLIT_SEED, "eval_share": EVAL_SHARE},
        "thresholds": "terrible < -1.5 <= bad < -0.35 <= neutral <= 0.35 < good < 1.5 <= great",
    } | {name: _counts(part) for name, part in parts.items()}


def parse(table: str) -> list[Sentence]:
    """The sentences of the tab-separated table, texts cleaned; a line that does not fit is an error, never dropped."""
    sentences = []
    for number, line in enumerate(table.splitlines(), start=1):
        try:
            name, score, text = line.split("\t")
            document, _, position = name.partition("_")
            if not (document.isdecimal() and position.isdecimal() and clean(text)):
                raise ValueError
            sentences.append(Sentence(name, float(score), clean(text)))
        except ValueError:
            raise DownloadError(
                "a line of the review table cannot be read",
                where=f"{_INNER}:{number}",
                got=repr(line[:80]),
                expected="document_sentence <tab> score <tab> text",
            ) from None
    return sentences


def clean(text: str) -> str:
    """HTML entities (some were escaped twice) back to characters, runs of white space to one space."""
    while (plain := html.unescape(text)) != text:
        text = plain
    return " ".join(text.split())


def grade(score: float) -> str:
    """The grade of a mean score from -4 to 4."""
    if score < -1.5:
        return "terrible"
    if score < -0.35:
        return "bad"
    if score <= 0.35:
        return "neutral"
    return "good" if score < 1.5 else "great"


def row(sentence: Sentence) -> dict[str, str]:
    """The prompt/completion row of a sentence."""
    prompt = f"Review: {sentence.text}\nSentiment:"
    return {"prompt": prompt, "completion": f" {grade(sentence.score)}", "id": sentence.id}


def split(sentences: Iterable[Sentence], *, share: float = EVAL_SHARE, seed: int = SPLIT_SEED) -> set[str]:
    """The documents held out for evaluation: `share` of the rows or just below, the same on every machine.

    Groups of documents are taken in the order of sha256("seed:first document") while they still fit.
    """
    rows = Counter(sentence.document for sentence in sentences)
    room = int(share * sum(rows.values()))
    held_out: set[str] = set()
    for group in sorted(_groups(sentences), key=lambda group: hashlib.sha256(f"{seed}:{group[0]}".encode()).digest()):
        size = sum(rows[document] for document in group)
        if size <= room:
            held_out.update(group)
            room -= size
    return held_out


def _groups(sentences: Iterable[Sentence]) -> set[tuple[str, ...]]:
    """Documents that share a sentence, directly or through others; each group in ascending order."""
    group: dict[str, set[str]] = {}
    sharing: dict[str, set[str]] = defaultdict(set)
    for sentence in sentences:
        sharing[sentence.text].add(sentence.document)
    for documents in sharing.values():
        merged = set().union(*(group.get(document, {document}) for document in documents))
        group.update(dict.fromkeys(merged, merged))
    return {tuple(sorted(members, key=int)) for members in group.values()}


def _counts(part: list[Sentence]) -> dict[str, Any]:
    grades = Counter(grade(sentence.score) for sentence in part)
    return {
        "rows": len(part),
        "documents": len({sentence.document for sentence in part}),
        "grades": {name: grades[name] for name in GRADES},
    }


def _table(archive: Path) -> str:
    """The text of the table, from the archive inside the archive; nothing is unpacked to disk."""
    try:
        with tarfile.open(archive, "r:gz") as outer:
            member = next(one for one in outer if one.isfile() and one.name.endswith("/" + _OUTER))
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:gz") as inner:
                table = inner.extractfile(inner.getmember(_INNER))
                assert table is not None  # getmember found a regular file or raised
                return table.read(_LARGEST_TABLE).decode("ascii")
    except (tarfile.TarError, StopIteration, KeyError, UnicodeDecodeError, EOFError) as error:
        where = str(archive)
        raise DownloadError("the archive does not hold the review table", where=where, got=repr(error)) from error
