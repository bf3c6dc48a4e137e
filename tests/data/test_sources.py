"""Rows come from files, from memory and from other libraries' data sets, and mean the same wherever they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

import gossamer as gs
from gossamer.data.formats import read_data
from gossamer.data.rows import Completion, Text
from gossamer.errors import CheckpointError, DataError
from gossamer.models import tiny_tokenizer
from gossamer.training import Job, train_many
from tests.training.toy_run import toy_model

RECORDS = [
    {"prompt": f"item {'x' * (n % 5)}:", "completion": f" {'good' if n % 2 else 'bad'}", "id": n} for n in range(8)
]
ROWS = [Completion(f"mine:{n}", one["prompt"], one["completion"]) for n, one in enumerate(RECORDS)]


class Dataset:
    """As `datasets.Dataset` is used: it has a length, and gives records."""

    def __len__(self) -> int:
        return len(RECORDS)

    def __iter__(self) -> Any:
        return iter(RECORDS)


def test_the_same_rows_from_anywhere(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    read = [read_data(source) for source in (file, RECORDS, Dataset(), (dict(one) for one in RECORDS))]
    for rows in read:
        assert [(row.question, row.label) for row in rows] == [(row.prompt, row.completion) for row in ROWS]
        assert (rows.format, rows.unused) == ("prompt-completion", ("id",))
    assert len({rows.digest for rows in (*read[1:], read_data(ROWS))}) == 1
    assert [row.where for row in read[1]][:2] == ["memory:1", "memory:2"]
    assert read[2].describe() == "memory: 8 rows of prompt/completion (Dataset); columns not used: id"


def test_a_data_set_of_hugging_face():
    assert read_data(datasets.Dataset.from_list(RECORDS)).digest == read_data(RECORDS).digest


def test_every_fault_is_named_with_its_place():
    with pytest.raises(DataError) as caught:
        read_data([*RECORDS[:2], {"prompt": "a", "completion": 3}, {"prompt": "", "completion": "b"}])
    assert "memory:3: 'completion' must be text" in str(caught.value)
    assert "memory:4: 'prompt' is empty" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "no rows"),
        (7, "a list of records"),
        ({"train": RECORDS}, "choose one"),
        (["a.jsonl", "b.jsonl"], "memory:1: expected a record"),
        ([ROWS[0], RECORDS[0]], "memory:2: expected a row"),
        ([RECORDS[0], ROWS[0]], "memory:2: expected a record"),
    ],
)
def test_what_holds_no_rows_is_refused(source: Any, words: str):
    with pytest.raises(DataError, match=words):
        read_data(source)


def config(folder: Path, rows: Any, **fields: Any) -> gs.TrainConfig:
    return gs.TrainConfig(
        data=rows, output=folder / "run", batch_size=4, checkpoint_every=1, keep_checkpoints=9, **fields
    )


def test_a_run_on_rows_in_memory_says_so_and_goes_on_with_the_same_rows(tmp_path: Path):
    def trained(rows: Any, resume: bool = False) -> gs.Run:
        settings = config(tmp_path, {"train": rows, "eval": ROWS[:4]}, epochs=2)
        return gs.train(toy_model(), tiny_tokenizer(), settings, resume=resume)

    run = trained(RECORDS)
    kept = gs.RunConfig.read(run.output / "config.yaml")
    assert str(kept.data.train).startswith("memory: 8 rows of prompt-completion, sha256 ")
    with pytest.raises(DataError, match="in memory"):
        kept.data.read()
    for name in ("step-3", "step-4"):
        shutil.rmtree(run.output / "checkpoints" / name, ignore_errors=True)
    (run.output / "report.html").unlink()
    with pytest.raises(CheckpointError, match="another run"):
        trained(RECORDS[1:], resume=True)
    again = trained(ROWS, resume=True)
    assert again.adapter == run.adapter


def test_evaluate_and_many_take_them_too(tmp_path: Path):
    model, tokenizer = toy_model(), tiny_tokenizer()
    assert gs.evaluate(model, tokenizer, RECORDS) == gs.evaluate(model, tokenizer, ROWS)
    assert gs.evaluate(model, tokenizer, [Text("mine:1", "good pie")])["rows"] == 1
    gs.detach(model, "default")
    jobs = {"one": Job(gs.LoRA(r=2), config(tmp_path, RECORDS, max_steps=1))}
    assert train_many(model, tokenizer, jobs)["one"].report["steps"] == 1
