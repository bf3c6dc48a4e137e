"""Checkpoints: everything comes back bit for bit, and nothing that was damaged is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.errors import CheckpointError
from gossamer.training.optim import make_optimizer
from gossamer.training.runs.checkpoint import FILES, MANIFEST, Checkpoint, newest_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def trained(seed: int = 0) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """Two parameters with two steps of AdamW behind them."""
    torch.manual_seed(seed)
    parameters = {"a.lora_A": nn.Parameter(torch.randn(2, 3)), "a.lora_B": nn.Parameter(torch.randn(4, 2))}
    optimizer = make_optimizer(parameters, 0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer


def save(folder: Path, step: int, *, keep: int = 2, **identity: object) -> Path:
    parameters, optimizer = trained(step)
    return save_checkpoint(folder, {"step": step, "identity": identity}, parameters, optimizer, CPU, keep=keep)


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    said: list[str] = []
    found = newest_checkpoint(folder, said.append)
    assert found
    return found, said


def test_everything_comes_back(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    save_checkpoint(tmp_path, {"step": 2, "identity": {}}, parameters, optimizer, CPU, keep=1)
    random = torch.randn(5)
    others, fresh = trained(seed=9)
    found, said = newest(tmp_path)
    found.restore(others, fresh, CPU)
    assert torch.equal(torch.randn(5), random)
    assert not said
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name])
        mine, theirs = optimizer.state[parameter], fresh.state[others[name]]
        assert all(torch.equal(mine[moment], theirs[moment]) for moment in ("step", "exp_avg", "exp_avg_sq"))


def test_old_ones_go_when_the_new_one_stands(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-12"]
    save(tmp_path, 11, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-11", "step-12"], "a later one is not an old one"


def test_none_and_nothing(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent", print) is None
    assert newest_checkpoint(tmp_path, print) is None


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied", "flipped", "extended"])
def test_damage_is_seen_and_the_one_before_used(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 8) / file
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    else:
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "extended": content + b" "}[damage])
    found, said = newest(tmp_path)
    assert found.state["step"] == 4
    assert len(said) == 1
    assert str(path.parent) in said[0]


def test_when_none_is_whole_all_are_named(tmp_path: Path) -> None:
    for step in (4, 8):
        (save(tmp_path, step) / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(tmp_path, lambda _: None)
    assert all(f"step-{step}" in str(caught.value) for step in (4, 8))


def test_a_half_written_one_is_named_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 4)
    half = tmp_path / ".step-8.0123456789ab.partial"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    found, said = newest(tmp_path)
    assert found.state["step"] == 4
    assert str(half) in said[0]
    assert not half.exists()


def test_another_run_s_checkpoint_is_refused_with_every_difference(tmp_path: Path) -> None:
    save(tmp_path, 4, train={"lr": 1e-3, "seed": 0}, method={"r": 8, "target_modules": ["q"]})
    found, _ = newest(tmp_path)
    found.refuse_other_run({"train": {"lr": 1e-3, "seed": 0}, "method": {"r": 8, "target_modules": ("q",)}})
    with pytest.raises(CheckpointError) as caught:
        found.refuse_other_run(
            {"train": {"lr": 2e-3, "seed": 0}, "method": {"r": 4, "target_modules": ["q"], "dropout": 0.1}}
        )
    message = str(caught.value)
    for line in ("train.lr: 0.001 then, 0.002 now", "method.r: 8 then, 4 now", "method.dropout: absent then, 0.1 now"):
        assert line in message
    assert "seed" not in message


def test_parameters_of_another_shape(tmp_path: Path) -> None:
    save(tmp_path, 4)
    parameters, optimizer = trained()
    parameters["a.lora_B"] = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(CheckpointError, match=r"a\.lora_B"):
        newest(tmp_path)[0].restore(parameters, optimizer, CPU)


class EightBit(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does: bytes, a table that serves every parameter, a count that is no tensor, and
    memory of its own kind, which nothing else may take the place of."""

    def __init__(self, parameters: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.table = torch.linspace(-1, 1, 256)

    def init_state(self, group: dict[str, Any], parameter: nn.Parameter, *_: int) -> None:
        state = self.state[parameter]
        state |= {"step": 0, "qmap": self.table, "absmax": torch.zeros(1)}
        state["codes"] = torch.full(parameter.shape, 128, dtype=torch.uint8)
        state["codes"].is_paged = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.init_state(group, parameter)
                state = self.state[parameter]
                state["step"] += 1
                value = 0.5 * state["qmap"][state["codes"].long()] * state["absmax"] + parameter.grad / state["step"]
                state["absmax"].fill_(value.abs().max().clamp_min(1e-12))
                state["codes"].copy_((value / state["absmax"] * 127.5 + 127.5).round())
                parameter.sub_(group["lr"] * value)


def eight_bit(seed: int) -> tuple[dict[str, nn.Parameter], EightBit]:
    torch.manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(4, 3)) for name in ("a.lora_A", "a.lora_B")}
    return parameters, EightBit([*parameters.values()])


def advance(parameters: dict[str, nn.Parameter], optimizer: EightBit) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_state_of_any_dtype_comes_back_where_its_optimiser_keeps_it(tmp_path: Path) -> None:
    parameters, optimizer = eight_bit(0)
    for _ in range(3):
        advance(parameters, optimizer)
    save_checkpoint(tmp_path, {"step": 3, "identity": {}}, parameters, optimizer, CPU, keep=1)
    advance(parameters, optimizer)
    others, fresh = eight_bit(9)
    newest(tmp_path)[0].restore(others, fresh, CPU)
    for name, parameter in others.items():
        state = fresh.state[parameter]
        assert state["step"] == 3
        assert state["codes"].is_paged
        assert state["qmap"] is fresh.table
        assert fresh.state[parameter].keys() == optimizer.state[parameters[name]].keys()
    advance(others, fresh)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name])
        mine, theirs = optimizer.state[parameter], fresh.state[others[name]]
        assert all(torch.equal(mine[key], theirs[key]) for key in ("codes", "absmax", "qmap"))
