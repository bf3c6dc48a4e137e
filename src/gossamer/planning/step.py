"""One training step on fake tensors, followed: forward, loss and backward of the real classes, method and kernels."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gossamer.attachment import attach
from gossamer.attachment.host import make_host
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.match import select
from gossamer.errors import GossamerError, UnsupportedError
from gossamer.methods import TargetedMethod
from gossamer.planning import fake
from gossamer.planning.counting import refuse_in_towers
from gossamer.planning.live import LiveBytes
from gossamer.planning.losses import StepLoss, usual_loss
from gossamer.planning.setting import TrainingSetting
from gossamer.planning.shape import ModelShape
from gossamer.planning.timeline import END, HEAD, LOSS, START, StepProfile, Stretch, Trained
from gossamer.quant import QuantizedLinear
from gossamer.running.fast import fast_path


def followed(
    model: nn.Module,
    spec: TargetedMethod,
    setting: TrainingSetting,
    checkpointing: bool,
    loss: StepLoss | None = None,
    shape: ModelShape | None = None,
) -> StepProfile:
    """Follow one step of a model (of the meta device, or any other: its numbers are not looked at).

    Raises: what attaching raises; UnsupportedError for a model that has no checkpointing, or a step that cannot be
    taken without numbers.
    """
    fake.warm()
    try:
        return _followed(model, spec, setting, checkpointing, loss, shape)
    except GossamerError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedError(
            "a training step of this model cannot be followed on tensors without numbers",
            where=shape.name if shape else type(model).__name__,
            got=reason,
        ) from error


def _followed(
    model: nn.Module,
    spec: TargetedMethod,
    setting: TrainingSetting,
    checkpointing: bool,
    loss: StepLoss | None,
    shape: ModelShape | None,
) -> StepProfile:
    found = {} if _kept_whole(model, spec) else {one.path: one for one in fake.stacks(model)}
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        copied = fake.faked(model, getattr(torch, setting.dtype))
        layers = {one.path: one for one in fake.stacks(copied)}
        repeats = fake.cut(copied, {path: layers[path] for path in found})
        whole = repeats or {f"{path}.{at}": 1 for path, one in layers.items() for at in range(one.layers)}
        if setting.quant:
            fake.quantise(copied, setting.quant)
        with LiveBytes(fake.tensors(copied).values()) as live:
            return _Step(copied, spec, setting, repeats or whole, live, shape).profile(checkpointing, loss)


def _kept_whole(model: nn.Module, spec: TargetedMethod) -> bool:
    """Whether a method stands at the whole model or may tell one layer from another, so that none stands for others."""
    given = spec.to_dict()
    named = [given.get(name) for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")]
    by_layer = ("layers_to_transform", "rank_pattern", "alpha_pattern")
    if (root := shape_of("", model)).kind == "model" and spec.fits(root):
        return True
    return fake.by_number(named) or any(given.get(name) not in (None, [], {}, ()) for name in by_layer)


class _Step:
    """One model on its way through a step."""

    def __init__(
        self, model: nn.Module, spec: TargetedMethod, setting: TrainingSetting, repeats: Mapping[str, int],
        live: LiveBytes, shape: ModelShape | None,
    ) -> None:  # fmt: skip
        self.shape, self.model, self.spec, self.setting, self.repeats, self.live = (
            shape,
            model,
            spec,
            setting,
            repeats,
            live,
        )
        self.marks: list[tuple[int, str, int]] = []
        self.backwards = False

    def profile(self, checkpointing: bool, loss: StepLoss | None) -> StepProfile:
        """Attach the method, take the step, and count."""
        model, setting, live = self.model, self.setting, self.live
        base = fake.stored(model, self.repeats)
        before = {*fake.tensors(model)}
        self.attach()
        added = [
            (name, one) for name, one in (*model.named_parameters(), *model.named_buffers()) if id(one) not in before
        ]
        beside = sum(one.nbytes * fake.repeat_of(name, self.repeats) for name, one in added)
        if setting.adapter_dtype != "float32" and self.spec.name != "full":
            for _, one in added:
                one.data = one.data.to(getattr(torch, setting.adapter_dtype)) if one.requires_grad else one.data
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        model.train()
        with ExitStack() as stack:
            fast = None
            if setting.path == "gossamer":
                fast = stack.enter_context(fast_path(model, fused=setting.fused))
            if checkpointing:
                stack.enter_context(checkpointed(model))
            stack.enter_context(self.watched())
            compute = loss or usual_loss(model, bool(fast and fast.packed))
            gc.collect()
            first = len(live.log)
            self.mark(START)
            live.answer = not setting.masked
            value = compute(model, setting)
            live.answer = True
            self.mark(LOSS)
            self.backwards = True
            value.backward()
            del value
        tensors: dict[tuple[int, int], int] = {}
        for name, one in trained.items():
            key = one.numel(), one.element_size()
            tensors[key] = tensors.get(key, 0) + fake.repeat_of(name, self.repeats)
        packed = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
        return StepProfile(
            sum(base.values()),
            beside,
            max((one.out_features * one.in_features * one.dtype.itemsize for one in packed), default=0),
            tuple(Trained(*key, times) for key, times in tensors.items()),
            tuple(self.stretches(first, trained.values())),
        )

    def attach(self) -> None:
        """Stand the method at the model; with path="peft" as a plain loop over transformers and PEFT would."""
        full = self.spec.name == "full"
        if self.shape is not None and self.shape.towers and not full:
            selected = select(self.model, self.spec).targets
            refuse_in_towers(self.shape, [*selected], self.spec.target_modules)
        if self.setting.path == "gossamer":
            make_host(self.model, {"weights": "none"})
            attach(self.model, self.spec)
        elif full or self.spec.name == "lora":
            self.model.requires_grad_(full)
            for path in () if full else select(self.model, self.spec).targets:
                _beside(self.model.get_submodule(path), self.spec, getattr(torch, self.setting.adapter_dtype))
        else:
            raise UnsupportedError(
                f"what {self.spec.name} keeps in PEFT is not known to the plan", expected="lora or full"
            )

    def mark(self, name: str, repeat: int = 1) -> None:
        """A stretch begins."""
        self.marks.append((len(self.live.log), name, repeat))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Mark where each layer begins, forwards and backwards."""
        ordered = [*self.repeats]
        hooks: list[Any] = []
        for path in ordered:
            layer, stack = self.model.get_submodule(path), path.rpartition(".")[0]
            place, count = ordered.index(path), len([one for one in ordered if one.rpartition(".")[0] == stack])
            place = int(path.rpartition(".")[2])
            words = "the first layer" if place == 0 else "the top layer" if place == count - 1 else "a layer"
            hooks.append(
                layer.register_forward_pre_hook(partial(self.enter, words, self.repeats[path]), with_kwargs=True)
            )
            hooks.append(layer.register_forward_hook(partial(self.leave, words, self.repeats[path])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def enter(self, words: str, repeat: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer begins its forward; what flows out of its backward ends it."""
        if self.backwards:
            return
        self.mark(f"{words}, forwards", repeat)
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if words == "the first layer" and given is not None and given.requires_grad:
            given.register_hook(lambda _: self.mark(END))

    def leave(self, words: str, repeat: int, _: nn.Module, args: Any, output: Any) -> None:
        """A layer ends its forward."""
        if self.backwards:
            return
        out = output if isinstance(output, Tensor) else output[0]
        if out.requires_grad:
            out.register_hook(lambda _: self.mark(f"{words}, backwards", repeat))
        if words == "the top layer":
            self.mark(HEAD)

    def stretches(self, first: int, trained: Any) -> Iterator[Stretch]:
        """What was logged between the marks."""
        log, born = self.live.log, self.live.born
        grads = {born[one.grad.untyped_storage()._cdata] for one in trained if one.grad is not None}
        ends = [place for place, _, _ in self.marks[1:]] + [len(log)]
        for (start, name, repeat), end in zip(self.marks, ends, strict=True):
            within = tuple(log[place] for place in grads if start <= place < end)
            yield Stretch(name, repeat, tuple(log[start:end]), within)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing as transformers' layers look for it. Raises `UnsupportedError` where there is none."""
    places = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not places:
        raise UnsupportedError("the model has no gradient checkpointing", where=type(model).__name__)
    for place in places:
        vars(place)["gradient_checkpointing"] = True
        vars(place)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    yield


def _beside(module: Any, spec: Any, dtype: torch.dtype) -> None:
    """PEFT's LoRA: its input copied to the factors' type, and the sum copied back."""
    inner, outer = module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
    down, up = nn.Linear(inner, spec.r, bias=False, dtype=dtype), nn.Linear(spec.r, outer, bias=False, dtype=dtype)
    module.lora_A, module.lora_B = down, up

    def term(_: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        x = nn.functional.dropout(inputs[0].to(dtype), spec.dropout) if spec.dropout else inputs[0].to(dtype)
        return (out + up(down(x)) * 2.0).to(out.dtype)

    module.register_forward_hook(term)
