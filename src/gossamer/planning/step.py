"""One training step on fake tensors, followed: forward, loss and backward of the real classes, method and kernels.

A loss is any callable `(model, setting) -> Tensor`, which makes its inputs itself.
"""

import gc
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from gossamer.kernels.losses import head_nll, token_nll
from gossamer.kernels.packed import NO_MASK, Packing, Segment
from gossamer.methods import TargetedMethod
from gossamer.planning import fake
from gossamer.planning.counting import refuse_in_towers
from gossamer.planning.setting import TrainingSetting
from gossamer.planning.shape import ModelShape
from gossamer.planning.timeline import END, HEAD, LOSS, START, StepProfile, Stretch, Trained
from gossamer.quant import QuantizedLinear
from gossamer.running.fast import fast_path

StepLoss = Callable[[nn.Module, TrainingSetting], Tensor]
"""A step up to its backward: the loss of one batch of a setting's rows and tokens."""


def usual_loss(model: Any, packed: bool) -> StepLoss:
    """What a model is trained on if nothing else is said.

    A causal language model predicts labelled tokens, packed where its training would pack; any other model is taken to
    have a loss that reads all of its first output.
    """
    if _causal(model):
        return lambda one, setting: next_token(one, setting, packed)
    return whole_output


def _causal(model: Any) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = getattr(model, "config", None)
    generates = hasattr(model, "can_generate") and model.can_generate()
    return generates and isinstance(head, nn.Module) and not getattr(config, "is_encoder_decoder", False)


def next_token(model: Any, setting: TrainingSetting, packed: bool) -> Tensor:
    """The labelled tokens' negative log-likelihood, as training computes it; or, with path="peft", transformers'."""
    rows, tokens = setting.batch, setting.sequence
    if setting.path == "peft":
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        mask = torch.ones_like(ids) if setting.masked else None
        return model(input_ids=ids, attention_mask=mask, labels=ids.clone(), use_cache=False).loss
    if packed and not setting.masked:
        lengths = [Segment(row * tokens, (row + 1) * tokens) for row in range(rows)]
        given = {"input_ids": torch.zeros(1, rows * tokens, dtype=torch.int64), "attention_mask": NO_MASK}
        given |= {"position_ids": torch.arange(tokens).repeat(rows)[None], "packing": Packing.of(lengths)}
    else:
        given = {"input_ids": torch.zeros(rows, tokens, dtype=torch.int64)}
        given |= {"attention_mask": torch.ones_like(given["input_ids"])} if setting.masked else {}
    at = torch.zeros(setting.labelled, dtype=torch.int64)
    return _labelled(model, given, at).sum() / setting.labelled


def _labelled(model: Any, given: dict[str, Any], at: Tensor) -> Tensor:
    head, targets = model.get_output_embeddings(), torch.zeros_like(at)
    trained = any(one.requires_grad for one in head.parameters())
    plain = type(head) is nn.Linear and not trained and "forward" not in vars(head)
    seen: dict[str, Tensor] = {}

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        picked = seen["hidden"] = inputs[0].reshape(-1, inputs[0].shape[-1]).index_select(0, at)
        return ((picked[:1] if plain else picked).unsqueeze(0), *inputs[1:])

    hooks = [head.register_forward_pre_hook(narrow)]
    hooks.append(head.register_forward_hook(lambda _, inputs, logits: seen.update(logits=logits.detach())))
    try:
        logits = model(**given, use_cache=False).logits
        if plain and logits.untyped_storage()._cdata != seen.pop("logits").untyped_storage()._cdata:
            plain = False  # the model does more to its logits, so all of them have to be there
            logits = model(**given, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if plain:
        del logits
        return head_nll(seen.pop("hidden"), head.weight, head.bias, targets)
    return token_nll(logits[0], targets)


def whole_output(model: Any, setting: TrainingSetting) -> Tensor:
    """The mean of a model's first output, from inputs of the kind that its class names."""
    out = model(**usual_inputs(model, setting))
    first = next(one for one in (out.values() if isinstance(out, dict) else [*out]) if isinstance(one, Tensor))
    return first.float().square().mean()


def usual_inputs(model: Any, setting: TrainingSetting) -> dict[str, Tensor]:
    """Token ids, an image or a sound of the size that the config says, for each row.

    Rows of one length have no mask: of real ones transformers sees that they need none, of fake ones it cannot.
    """
    config, name, rows = model.config, model.main_input_name, setting.batch
    if name == "pixel_values":
        sight = getattr(config, "vision_config", config)
        height, width = size if isinstance(size := sight.image_size, list | tuple) else (size, size)
        return {name: torch.empty(rows, sight.num_channels, height, width, dtype=model.dtype)}
    if name == "input_features":
        frames = 2 * config.max_source_positions
        given = {name: torch.empty(rows, config.num_mel_bins, frames, dtype=model.dtype)}
    else:
        given = {name: torch.zeros(rows, setting.sequence, dtype=torch.int64)}
        given |= {"attention_mask": torch.ones_like(given[name])} if setting.masked else {}
        if hasattr(config, "vision_config"):
            sight = config.vision_config
            given["pixel_values"] = torch.empty(rows, sight.num_channels, sight.image_size, sight.image_size)
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = torch.zeros(rows, setting.sequence, dtype=torch.int64)
    return given


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
        whole = _kept_whole(model, spec)
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            stacks = fake.stacks(model)
            copied = fake.faked(model, getattr(torch, setting.dtype), {} if whole else stacks)
            repeats = {} if whole else fake.cut(copied, stacks)
            repeats = repeats or {f"{path}.{at}": 1 for path, count in stacks.items() for at in range(count)}
            if setting.quant:
                fake.quantise(copied, setting.quant)
            with fake.LiveBytes(fake.tensors(copied).values()) as live:
                return _Step(copied, spec, setting, repeats, live, shape).profile(checkpointing, loss)
    except GossamerError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedError(
            "a training step of this model cannot be followed on tensors without numbers",
            where=shape.name if shape else type(model).__name__,
            got=reason,
        ) from error


def _kept_whole(model: nn.Module, spec: TargetedMethod) -> bool:
    """Whether a method stands at the whole model or may tell one layer from another, so that none stands for others."""
    given = spec.to_dict()
    named = [given.get(name) for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")]
    by_layer = ("layers_to_transform", "rank_pattern", "alpha_pattern")
    if (root := shape_of("", model)).kind == "model" and spec.fits(root):
        return True
    return re.search(r"\d", str(named)) is not None or any(
        given.get(name) not in (None, [], {}, ()) for name in by_layer
    )


@dataclass
class _Step:
    """One model on its way through a step; `marks`: where in the log, what begins, how many layers it stands for."""

    model: nn.Module
    spec: TargetedMethod
    setting: TrainingSetting
    repeats: Mapping[str, int]
    live: fake.LiveBytes
    shape: ModelShape | None
    marks: list[tuple[int, str, int]] = field(default_factory=list)
    backwards: bool = False

    def profile(self, checkpointing: bool, loss: StepLoss | None) -> StepProfile:
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
            ours = setting.path == "gossamer"
            fast = stack.enter_context(fast_path(model, fused=setting.fused)) if ours else None
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
        self.marks.append((len(self.live.log), name, repeat))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Mark where each layer begins, forwards and backwards."""
        ordered = [*self.repeats]
        hooks: list[Any] = []
        for path in ordered:
            layer, (stack, _, number) = self.model.get_submodule(path), path.rpartition(".")
            place, count = int(number), len([one for one in ordered if one.rpartition(".")[0] == stack])
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
