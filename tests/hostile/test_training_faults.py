"""Training faults: poisoned rows, full disks, damaged and half-written checkpoints."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.errors import CheckpointError, DiskError, GossamerError, NonFiniteError, ResourceError
from tests.training.toy_run import Watcher, curve, fingerprint, metrics_of, toy_config, toy_model, toy_train


class Killed(BaseException):
    """The process is gone; nothing may handle this."""


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_train(toy_config(tmp_path_factory.mktemp("untroubled"))).output


def captured(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in gs.trainable_parameters(model, "default").items()}


def test_a_poisoned_row_is_named_and_its_step_not_taken(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {index}:", "completion": " ok"} for index in range(12)]
    rows[7]["prompt"] = "row \x7f:"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = toy_model()
    from gossamer.models import tiny_tokenizer

    poison = tiny_tokenizer()("\x7f")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    steps: list[dict[str, torch.Tensor]] = [captured(model)]
    config = toy_config(tmp_path, batch_size=1, accumulation=2)
    with pytest.raises(NonFiniteError) as caught:
        toy_train(config, model=model, progress=Watcher(lambda _: steps.append(captured(model))))
    assert caught.value.where == f"{tmp_path}/rows.jsonl:8"
    assert f"loss of step {len(steps)}" in caught.value.what
    assert all(torch.equal(value, steps[-1][name]) for name, value in captured(model).items())
    last = metrics_of(tmp_path / "run")[-1]
    assert last == {"step": len(steps), "loss": None, "fault": "non-finite loss"}
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(tmp_path: Path, value: float) -> None:
    model, seen = toy_model(), []
    parameter = gs.trainable_parameters(model, "default")["model.layers.1.mlp.up_proj.lora_B"]
    parameter.register_hook(lambda gradient: seen.append(1) or (gradient * value if len(seen) == 5 else gradient))
    with pytest.raises(NonFiniteError, match="gradient of step 3") as caught:
        toy_train(toy_config(tmp_path), model=model)
    assert "model.layers.1.mlp.up_proj.lora_B" in caught.value.got
    assert all(torch.isfinite(tensor).all() for tensor in captured(model).values())


def write_calls(action: Callable[[], None], at: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Run `action` instead of the `at`-th call that puts something on disk; returns the calls made so far."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                action()
            return real(*arguments, **named)

        return call

    for owner, name in [(os, "fsync"), (os, "rename"), (os, "replace"), (Path, "write_bytes"), (Path, "mkdir")]:
        patch.setattr(owner, name, counted(name, getattr(owner, name)))
    return calls


def refuse(number: int) -> Callable[[], None]:
    def action() -> None:
        raise OSError(number, os.strerror(number))

    return action


def die() -> None:
    raise Killed


def all_write_calls(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = write_calls(lambda: None, 0, patch)
        toy_train(toy_config(tmp_path))
    return len(calls)


@pytest.mark.parametrize("kind", ["full", "broken", "killed"])
def test_a_fault_at_any_write_loses_no_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, untroubled: Path, kind: str
) -> None:
    total = all_write_calls(tmp_path_factory.mktemp("count"))
    assert total > 60
    action = {"full": refuse(errno.ENOSPC), "broken": refuse(errno.EIO), "killed": die}[kind]
    for point in range(
        {"full": 1, "broken": 4, "killed": 7}[kind], total + 1, 9
    ):  # together they meet a third of all writes
        folder = tmp_path_factory.mktemp("faulty")
        config = toy_config(folder)
        with pytest.MonkeyPatch.context() as patch:
            write_calls(action, point, patch)
            with pytest.raises(DiskError if kind != "killed" else Killed) as caught:
                toy_train(config)
        if kind == "full":
            assert "No space left on device" in str(caught.value)
        run = toy_train(config, resume=(folder / "run").exists())
        assert fingerprint(run.output) == fingerprint(untroubled), point
        assert curve(run.output) == curve(untroubled), point
        assert not list(run.output.rglob("*.partial")), point


def test_damage_to_the_newest_checkpoint_costs_steps_but_not_the_result(tmp_path: Path, untroubled: Path) -> None:
    config = toy_config(tmp_path)
    stop = Watcher(lambda step: die() if step == 7 else None)
    with pytest.raises(Killed):
        toy_train(config, progress=stop)
    newest = tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    watcher = Watcher()
    run = toy_train(config, resume=True, progress=watcher)
    assert f"passing over {newest}" in watcher.text
    assert "resuming after step 3 of 8" in watcher.text
    assert fingerprint(run.output) == fingerprint(untroubled)


def test_damage_to_all_of_them_is_an_error(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    with pytest.raises(Killed):
        toy_train(config, progress=Watcher(lambda step: die() if step == 7 else None))
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole") as caught:
        toy_train(config, resume=True)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), {}),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), {}),
    ],
)
def test_out_of_memory_says_what_to_turn(tmp_path: Path, error: Exception, fields: dict[str, Any]) -> None:
    model = toy_model()

    def fail(*_: Any) -> None:
        raise error

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ResourceError, match=r"train\.checkpointing: on") as caught:
        toy_train(toy_config(tmp_path, **fields), model=model)
    assert caught.value.exit_code == 4


def test_bad_rows_leave_no_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": 3}\n')
    with pytest.raises(GossamerError, match=r"rows\.jsonl:1"):
        toy_train(toy_config(tmp_path))
    assert not (tmp_path / "run").exists()
