"""The bench of training: equal work for everybody, and nobody timed who computes something else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, training
from bench.trainers import elsewhere, ours, peers, work
from bench.trainers.contender import Loop, transformers_loss
from bench.trainers.work import Work

SMALL = dict(zip(work._SHAPE, (32, 2, 4, 2, 48, 300, True), strict=True))
HERE = [key for key, entry in training.CONTENDERS.items() if not entry.needs]


@pytest.fixture(scope="module")
def toy() -> Work:
    torch.set_num_threads(1)
    base, tokenizer = work.load_base("tiny", None, torch.float32)
    return training.build(base, tokenizer, "instructions", 1, real=False)


def test_the_rows_are_those_that_the_page_tells_of(toy: Work):
    assert (toy.tokens, toy.supervised, 8 * max(map(len, toy.examples))) == (1475, 353, 1880)
    assert len({tuple(one.ids[: work.PREFIX]) for one in toy.examples}) == 1
    assert len({tuple(one.ids[: work.PREFIX + 2]) for one in toy.examples}) > 1
    equal = training.build(toy.base, toy.tokenizer, "full rows", 1, real=False)
    assert (equal.tokens, equal.supervised) == (8 * 184, 8 * 183)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(work.WORKLOADS, "instructions", ((30, 8), (28, 6), (40, 3)))
    monkeypatch.setitem(work.WORKLOADS, "full rows", ((0, 12),) * 3)


@pytest.mark.usefixtures("short")
def test_everybody_does_the_same_work_on_a_toy(capsys: pytest.CaptureFixture[str]):
    words = ["--base", "tiny", "--dtype", "float32", "--rounds", "1", "--workload", "instructions"]
    rows = training.main([*words, "--contenders", *HERE, "peft-low"])
    assert [row["trainer"] for row in rows] == [training.CONTENDERS[key].label for key in HERE]
    assert all(float(row["gradient off float64"]) < 1e-5 for row in rows)
    memory = {row["trainer"]: row["MB above the weights"] for row in rows}
    assert memory["+ shared prefix"] < memory["+ fused blocks"] < memory["PEFT, plain loop"]
    assert "Left out: PEFT, adapters in bfloat16 (needs bfloat16)" in capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_random_weights_in_a_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(work.SHAPES, "toy", SMALL)
    told = tmp_path / "result.json"
    words = ["--shape", "toy", "--dtype", "bfloat16", "--rounds", "1", "--workload", "full rows", "--json", str(told)]
    rows = training.main([*words, "--contenders", "peft-low", "peft-autocast", "ours-shared"])
    assert [row["dtype"] for row in rows] == [
        "bfloat16, trained: float32", "bfloat16", "bfloat16, trained: float32", "bfloat16, trained: float32"
    ]  # fmt: skip
    assert "random weights in the shape of toy" in told.read_text()


def another_loss(given: Work) -> Any:
    model, named = peers.with_peft(given)
    loss = transformers_loss(model, given)
    return Loop(model, named, lambda: 1.001 * loss())


def another_value(given: Work) -> Any:
    first = next(iter(given.factors))
    changed = {name: value + (name == first) * 1e-3 for name, value in given.factors.items()}
    return peers.peft_loop(replace(given, factors=changed))


def fewer_trained(given: Work) -> Any:
    model, named = peers.with_peft(given)
    named.popitem()[1].requires_grad_(False)
    return Loop(model, named, transformers_loss(model, given))


def rows_that_see_each_other(given: Work) -> Any:
    model, named = peers.with_peft(given)
    whole: Tensor = torch.tensor([[token for one in given.examples for token in one.ids]])
    learned = torch.tensor([[place and flag for one in given.examples for place, flag in enumerate(one.supervised)]])
    labels = torch.where(learned.bool(), whole, -100)
    return Loop(model, named, lambda: model(input_ids=whole, attention_mask=torch.ones_like(whole), labels=labels).loss)


@pytest.mark.parametrize("cheat", [another_loss, another_value, fewer_trained, rows_that_see_each_other])
def test_other_work_is_not_timed(toy: Work, cheat: Any):
    with pytest.raises(AssertionError, match=re.escape("a cheat: ")):
        training.check(training.Entry("a cheat", cheat), cheat(toy), toy, peers.truth_of_lora(toy))


def test_no_variant_leaves_anything_standing(toy: Work):
    model = ours.lora(ours.SHARED)(toy)
    inner = model.model
    model.step()
    model.close()
    assert inner.config._attn_implementation == "sdpa"
    assert not [
        one for one in inner.modules() if type(one).__name__.endswith("DecoderLayer") and "forward" in vars(one)
    ]


@pytest.mark.slow
def test_a_contender_in_another_process(toy: Work):
    there = elsewhere.Elsewhere(toy, elsewhere.peft_there)
    entry = training.Entry("there", peers.peft_loop)
    here, right = peers.peft_loop(toy), peers.truth_of_lora(toy)
    assert training.check(entry, there, toy, right) == training.check(entry, here, toy, right)
    assert there.held() == here.held() > 0
    there.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "parts", [("kernels", "serving", "training"), pytest.param(("tests",), marks=pytest.mark.slow)], ids=len
)
def test_the_script_for_a_gpu_runs_on_a_toy(parts: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    told = tmp_path / "gpu.json"
    rows = gpu.main(["--parts", *parts, "--rounds", "1", "--json", str(told)])
    rows_of = {"kernels": 10, "serving": 12, "training": 6, "tests": 1}
    assert [row["part"] for row in rows] == [part for part in parts for _ in range(rows_of[part])]
    assert all(float(row["off float64"]) < 1e-5 for row in rows if row["part"] in ("kernels", "training"))
    assert "no CUDA device" in capsys.readouterr().out
    assert not told.exists(), "no figure of a GPU without a GPU"
