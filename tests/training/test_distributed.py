"""Two and four processes learn what one does: shared rows, sharded weights, errors, signals, restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import gossamer as gs
from gossamer.attachment import capture, trainable_parameters
from gossamer.data.batches import collate
from gossamer.errors import DiskError, StateError, UnsupportedError, UsageError
from gossamer.models import tiny_tokenizer
from gossamer.quant import quantize_model
from gossamer.training.evaluate import pad_id
from gossamer.training.loss import supervised_nll
from gossamer.training.memory import checkpointing
from gossamer.training.runs.checkpoint import newest_checkpoint, save_checkpoint
from gossamer.training.spread.exchange import Exchange, shares
from gossamer.training.spread.sharding import Sharding, is_sharded, shard
from gossamer.training.spread.world import World, _round
from gossamer.training.stopping import StopRequest, interruptible
from tests.house.tree import ROOT
from tests.training.worlds import STEPS, Failed, Learned, in_world, learn, rows, toy

torch.set_num_threads(1)
HashStore: Any = torch.distributed.HashStore  # pyright: ignore[reportPrivateImportUsage]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name].to(one[name].dtype)).norm() / one[name].norm()) for name in one)


def assert_same_learning(alone: Learned, others: list[Any]) -> None:
    """The same to rounding as one process alone, and bit for bit the same in all of them."""
    for other in others:
        assert isinstance(other, Learned), other
        assert other.losses == pytest.approx(alone.losses, rel=1e-6)
        assert max(map(distance, alone.gradients, other.gradients)) < 1e-5
        assert distance(alone.parameters, other.parameters) < 1e-5
        assert all(torch.equal(value, others[0].parameters[name]) for name, value in other.parameters.items())


# Sharing out ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(2, 5))
def test_every_row_is_dealt_once_and_no_piece_is_larger_than_before(sizes: list[list[int]], size: int):
    lengths = [length for batch in sizes for length in batch]
    count = iter(range(len(lengths)))
    batches = [[next(count) for _ in batch] for batch in sizes]
    dealt = shares(batches, lengths, size, even=True)
    learned = [index for share in dealt for piece in share if piece.weight for index in piece.indices]
    assert sorted(learned) == list(range(len(lengths)))
    area = max(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert all(len(piece.indices) * max(lengths[i] for i in piece.indices) <= area for one in dealt for piece in one)
    assert len({len(share) for share in dealt}) == 1
    loads = [sum(lengths[i] for piece in share if piece.weight for i in piece.indices) for share in dealt]
    assert max(loads) - min(loads) <= max(lengths)


def test_one_process_keeps_its_batches():
    assert [piece.indices for piece in shares([[2, 0], [1]], [5, 1, 9], 1)[0]] == [[2, 0], [1]]


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.here("cpu")
    assert (world.size, world.leads, world.first(lambda: 7), world.gathered(7)) == (1, True, 7, [7])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        World.here("cpu")


# Data parallel --------------------------------------------------------------------------------------------------


def shared_rows(world: World) -> Learned:
    return learn(world, toy())


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_rows_learn_what_one_does(size: int):
    alone = learn(World(), toy())
    assert_same_learning(alone, in_world(size, shared_rows))


def test_what_differs_is_rounding():
    """Against float64, two processes are as close as one is."""
    exact = learn(World(), toy(dtype=torch.float64))
    alone = learn(World(), toy())
    both = in_world(2, shared_rows)[0]
    for truth, one, two in zip(exact.gradients, alone.gradients, both.gradients, strict=True):
        assert distance(truth, two) < 2 * distance(truth, one) < 1e-4


class Loss(nn.Module):
    """What DistributedDataParallel wraps: from a batch to this process' part of the mean loss, times their number."""

    def __init__(self, model: Any, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, batch: Any) -> torch.Tensor:
        return supervised_nll(self.model, batch).sum() * self.factor


def beside_ddp(world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    batches, examples = [[0, 1, 2, 3]], rows()
    ours = learn(world, toy(), [batches]).gradients[0]
    model, supervised = toy(), sum(sum(examples[index].supervised[1:]) for index in batches[0])
    dealt = shares(batches, [len(one) for one in examples], world.size)[world.rank]
    wrapped = nn.parallel.DistributedDataParallel(Loss(model, world.size / supervised))  # which takes the mean
    batch = collate([examples[index] for index in dealt[0].indices], pad_id(tiny_tokenizer()))
    wrapped(batch).backward()
    return ours, {name: one.grad for name, one in trainable_parameters(model, "default").items()}


def test_one_all_reduce_is_what_ddp_computes():
    for ours, theirs in in_world(2, beside_ddp):
        assert distance(theirs, ours) < 1e-6


def agreements(world: World) -> dict[str, Any]:
    seen: dict[str, Any] = {"first": world.first(lambda: world.rank + 10), "gathered": world.gathered(world.rank)}
    value = torch.full((3,), float(world.rank))
    world.copy_from_first([value])
    seen["copied"] = value.tolist()
    entered = []

    @contextmanager
    def folder():
        entered.append(world.rank)
        yield "folder"

    with world.opened(folder) as opened:
        seen["opened"] = opened, entered

    def full() -> None:
        raise DiskError("the disk is full", where="/runs")

    for name, act in {
        "refused": lambda: world.first(full),
        "same": lambda: world.require_same("data", {"train": "abc"}),
        "other": lambda: world.require_same("data", {"train": f"of {world.rank}", "eval": "abc"}),
    }.items():
        try:
            seen[name] = act()
        except (DiskError, StateError) as error:
            seen[name] = str(error)
    world.reseed(1, 2)
    seen["drawn"] = torch.rand(()).item()
    return seen


def test_the_first_process_acts_for_all():
    one, two = in_world(2, agreements)
    assert one["first"] == two["first"] == 10
    assert one["gathered"] == [0, 1]
    assert two["copied"] == [0.0] * 3
    assert (one["opened"], two["opened"]) == (("folder", [0]), ("folder", []))
    assert "the disk is full" in one["refused"]
    assert one["refused"] == two["refused"]
    assert one["same"] is None
    assert "train of process 1" in one["other"] == two["other"]
    assert one["drawn"] != two["drawn"]


# Errors and signals ---------------------------------------------------------------------------------------------


def failing(world: World, error: Exception) -> Any:
    model = toy()
    parameters = [*trainable_parameters(model, "default").values()]
    before = [one.detach().clone() for one in parameters]
    try:
        with Exchange(world, parameters, [[0, 1]], [4, 4]):
            if world.rank == 1:
                raise error
    except Exception as caught:
        unchanged = all(map(torch.equal, before, parameters))
        return type(caught).__name__, str(caught), unchanged, world.gathered(world.rank)
    return "nothing was raised"


def test_an_error_in_one_process_is_one_in_all():
    one, two = in_world(2, failing, StateError("not so"))
    assert one == two == ("StateError", "wrong-state: not so", True, [0, 1])


def test_an_error_of_torch_is_told_to_the_others():
    one, two = in_world(2, failing, torch.OutOfMemoryError("no room\nat all"))
    assert one[0] == "ResourceError"
    assert "OutOfMemoryError: no room" in one[1]
    assert two[:2] == ("OutOfMemoryError", "no room\nat all")


def vanishing(world: World) -> Any:
    if world.rank == 1:
        os._exit(1)
    return world.gathered(world.rank)


def test_a_process_that_vanishes_is_noticed():
    one, two = in_world(2, vanishing)
    assert isinstance(two, Failed)
    assert one.kind == "ResourceError"
    assert "cannot be reached" in one.text


class Stopped(Exception):
    """A small loop that stopped."""


def signalled(world: World) -> tuple[int, str]:
    last = 0
    with interruptible() as request:

        def after(step: int, *_: Any) -> None:
            nonlocal last
            last = step
            if world.rank == 1 and step == 1:
                signal.raise_signal(signal.SIGTERM)
            if world.stop(request):
                raise Stopped

        try:
            learn(world, toy(), after=after)
        except Stopped:
            return last, request.signal
    return last, "nobody stopped"


def test_a_signal_to_one_process_stops_all_after_the_same_step():
    assert in_world(4, signalled) == [(1, "SIGTERM")] * 4


def test_alone_a_signal_is_what_it_was():
    request = StopRequest()
    assert World().stop(request) == ""
    request.signal = "SIGINT"
    assert World().stop(request) == "SIGINT"


# Sharded weights ------------------------------------------------------------------------------------------------

CASES = {
    "lora": (gs.LoRA(r=2, target_modules="all-linear"), "llama", False),
    "checkpointing": (gs.LoRA(r=2, target_modules="all-linear"), "llama", True),
    "dora": (gs.DoRA(r=2, target_modules="all-linear"), "llama", False),
    "tied head and all parameters": (gs.LoRA(r=2, modules_to_save=["norm"]), "gemma", False),
    "prefix": (gs.PrefixTuning(num_virtual_tokens=3), "llama", False),
}


def learn_case(world: World, name: str, across: Any = None) -> Learned:
    method, architecture, checkpointed = CASES[name]
    model = toy(architecture, method=method)
    if across:
        shard(model, world, across=across)
    with checkpointing(model, checkpointed):
        return learn(world, model)


def learn_sharded(world: World, across: Any) -> dict[str, Learned]:
    learned = {}
    for name in CASES:
        learned[name] = learn_case(world, name, across)
        world.sharded = False
    return learned


@pytest.mark.parametrize(("size", "machines", "across"), [(2, 1, "machine"), (4, 2, "machine"), (4, 2, "all")])
def test_processes_that_share_the_base_learn_what_one_does(size: int, machines: int, across: str):
    results = in_world(size, learn_sharded, across, machines=machines)
    assert not [one for one in results if isinstance(one, Failed)], results
    for name in CASES:
        assert_same_learning(learn_case(World(), name), [one[name] for one in results])


def look_inside(world: World, across: Any) -> dict[str, Any]:
    model = toy()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = capture(model)
    batch = collate(rows()[:3], 0)
    said = shard(model, world, across=across)
    with torch.no_grad():
        nll = supervised_nll(model.eval(), batch)
    after = capture(model)
    refused = []
    for act in (lambda: shard(model, world), lambda: shard(gs.detach(model) or model, world)):
        try:
            act()
        except StateError as error:
            refused.append(error.what)
    return {
        "said": said,
        "nll": nll,
        "kept": weight.untyped_storage().nbytes(),
        "same": before.digest == after.digest and before.base == after.base,
        "refused": refused,
        "sharded": is_sharded(model),
    }


@pytest.mark.parametrize(("across", "holders"), [("machine", 2), ("all", 4)])
def test_each_process_holds_its_part_and_whole_adapters(across: str, holders: int):
    model = toy()
    base = sum(p.nbytes for name, p in model.named_parameters() if "gossamer" not in name)
    with torch.no_grad():
        expected = supervised_nll(model.eval(), collate(rows()[:3], 0))
    for one in in_world(4, look_inside, across, machines=2):
        said: Sharding = one["said"]
        assert (said.processes, said.units, said.whole_bytes) == (holders, 2, base)
        assert base / holders <= said.own_bytes < base / holders * 1.02
        assert base / 4 < said.largest_bytes < base / 2
        assert one["kept"] <= 4  # whoever knew the whole weight holds nothing of it
        assert one["same"]
        assert one["sharded"]
        assert len(one["refused"]) == 2
        torch.testing.assert_close(one["nll"], expected, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_sharded_is_refused_by_name():
    with pytest.raises(UsageError, match="several processes"):
        shard(toy(), World())
    two = World(size=2, local_size=2)
    with pytest.raises(UsageError, match="same number of processes"):
        shard(toy(), World(size=3, local_size=2))
    plain = toy()
    gs.detach(plain)
    with pytest.raises(StateError, match="no adapter"):
        shard(plain, two)
    unnamed = toy()
    unnamed._no_split_modules = []
    with pytest.raises(UnsupportedError, match="does not name its layers"):
        shard(unnamed, two)
    with pytest.raises(UnsupportedError, match="prompt tuning"):
        shard(toy(method=gs.PromptTuning(num_virtual_tokens=3)), two)
    packed = toy()
    gs.detach(packed)
    quantize_model(packed, "nf4", ())
    gs.attach(packed, gs.LoRA(r=2))
    with pytest.raises(UnsupportedError, match="4 or 8 bits"):
        shard(packed, two)


# Restarts -------------------------------------------------------------------------------------------------------


def learn_on(world: World, folder: Path, stop_at: int | None, go_on: bool) -> Learned | str:
    model = toy(method=gs.LoRA(r=2, dropout=0.3))

    def after(step: int, parameters: Any, optimizer: Any) -> None:
        if stop_at == step:
            state = {"step": step + 1, "identity": {}, "processes": world.size}
            world.first(lambda: save_checkpoint(folder, state, parameters, optimizer, world.device, keep=1) and None)
            raise Stopped

    checkpoint = world.first(lambda: newest_checkpoint(folder, print)) if go_on else None
    try:
        return learn(world, model, after=after, checkpoint=checkpoint)
    except Stopped:
        return world.resumed(1)


def test_resuming_with_as_many_processes_is_exact(tmp_path: Path):
    whole = in_world(2, learn_on, tmp_path, None, False)
    said = in_world(2, learn_on, tmp_path, 1, False)
    assert "1 processes, this one has 2" in said[0]
    assert [place.name for place in tmp_path.iterdir()] == ["step-2"]
    for before, after in zip(whole, in_world(2, learn_on, tmp_path, None, True), strict=True):
        assert all(torch.equal(value, after.parameters[name]) for name, value in before.parameters.items())
        assert before.losses[2:] == after.losses


def learn_half(world: World, folder: Path) -> str:
    def after(step: int, parameters: Any, optimizer: Any) -> None:
        state = {"step": step + 1, "identity": {}, "processes": world.size}
        world.first(lambda: save_checkpoint(folder, state, parameters, optimizer, world.device, keep=1) and None)

    learn(world, toy(), STEPS[:2], after=after)
    return world.resumed(world.size)


def test_resuming_with_other_processes_goes_on_to_rounding(tmp_path: Path):
    assert in_world(2, learn_half, tmp_path) == ["", ""]
    resumed = learn(World(), toy(), checkpoint=newest_checkpoint(tmp_path, print))
    assert distance(learn(World(), toy()).parameters, resumed.parameters) < 1e-5


def sharded_to_the_end(world: World) -> Learned:
    model = toy()
    shard(model, world)
    return learn(world, model)


def test_a_restart_on_the_same_store_meets_nobody_from_before():
    """torchrun keeps its store; the words of the dead in it must not be taken for those of the living."""
    store, names = HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = {*pool.map(lambda rank: _round(store, rank, 3, timedelta(seconds=20)), (1, 2, 0))}
        assert len(found) == 1
        names += found
    assert len({*names}) == 3
    with pytest.raises(TimeoutError):
        _round(HashStore(), 0, 2, timedelta(seconds=0.05))


@pytest.mark.slow
def test_torchrun_restarts_what_died_and_it_ends_the_same(tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", str(ROOT / "tests/training/torchrun_worker.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resumed").read_text() == "from step 2"
    ended, whole = load_file(tmp_path / "end.safetensors"), in_world(2, sharded_to_the_end)[0]
    assert all(torch.equal(value, whole.parameters[name]) for name, value in ended.items())
