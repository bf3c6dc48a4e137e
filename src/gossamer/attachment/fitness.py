"""Which modules cannot carry a layer, or are left out unless they are named, and the words that say why."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from gossamer.attachment import walk
from gossamer.attachment.bypass import Bypass
from gossamer.attachment.kinds import kind_of, looks_like, shape_of, why_not
from gossamer.errors import UnsupportedError
from gossamer.methods import Shape, TargetedMethod
from gossamer.methods.base import AFFINE_KINDS

MEANT_FOR_ALL = ("all-linear", "auto")
"""Patterns that name no module, and leave out what had better not be adapted."""


@dataclass(frozen=True)
class Fitness:
    """What a method finds at the modules of a model.

    Attributes:
        able: paths where it can stand, in the model's order.
        barred: path -> why its layers would not mean there what they mean; it would have stood there otherwise.
        aside: path -> why "all-linear" and "auto" leave a module out, whether or not it could be named.
    """

    able: tuple[str, ...]
    barred: Mapping[str, str]
    aside: Mapping[str, str]

    @property
    def nameable(self) -> list[str]:
        """Where a pattern may point; at a barred one the answer is why."""
        return [*self.able, *self.barred]


def fitness(
    spec: TargetedMethod,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, Shape],
    bypass: Mapping[str, Bypass],
) -> Fitness:
    """Where a method can stand, where it cannot, and what it leaves out by itself."""
    able: list[str] = []
    barred: dict[str, str] = {}
    aside: dict[str, str] = {}
    for path, shape in shapes.items():
        why = _why_barred(path, shape, modules[path], bypass) if spec.beside_calls else ""
        if why and spec.fits(shape_of(path, modules[path], kind=looks_like(modules[path]))):
            barred[path] = why
        elif not why and (shape.kind != "model" if path else shape.kind in ("model", "")) and spec.fits(shape):
            able.append(path)
            if spec.beside_calls and path in bypass:
                aside[path] = (
                    f"{_reader(bypass[path])} uses its {bypass[path].parameter} without calling it in training"
                )
    if spec.target_modules in MEANT_FOR_ALL:
        aside |= dict.fromkeys(_beside_the_text(model, modules), "text does not reach it")
    return Fitness(tuple(able), barred, aside)


def _why_barred(path: str, shape: Shape, module: nn.Module, bypass: Mapping[str, Bypass]) -> str:
    kind = shape.kind or looks_like(module)
    if kind not in AFFINE_KINDS:
        return ""
    if not shape.kind:
        return why_not(module, kind)
    if path in bypass and not bypass[path].only_training:
        return f"{_reader(bypass[path])} uses its {bypass[path].parameter} without calling it"
    return ""


def _reader(one: Bypass) -> str:
    return type(next(iter(one.readers.values()))).__name__


def refuse_barred(targets: Iterable[str], fit: Fitness, modules: Mapping[str, nn.Module]) -> None:
    """Raise `UnsupportedError` for a module that a pattern names and that cannot carry a layer."""
    for path in targets:
        if path in fit.barred:
            raise UnsupportedError(
                f"a layer at this {type(modules[path]).__name__} would not say what it says: {fit.barred[path]}",
                where=path,
                hint="leave it out with exclude_modules; modules_to_save and bias train parameters of it whole",
            )


def left_out(paths: Iterable[str], why: Mapping[str, str], spec: TargetedMethod) -> tuple[str, ...]:
    """One note for each reason."""
    reasons: dict[str, Counter[str]] = {}
    for path in paths:
        place = ".".join(part for part in path.split(".") if not part.isdigit()) or path
        reasons.setdefault(why[path], Counter())[place] += 1
    return tuple(
        f"note: {spec.target_modules} leaves out {_listed(places)}: {reason}" for reason, places in reasons.items()
    )


def _listed(places: Counter[str]) -> str:
    """Some places, with how many modules each is; of many the parts of the model they are in."""
    if len(places) > 4:
        parts: Counter[str] = Counter()
        for place, count in places.items():
            words = place.split(".")
            parts[words[1] if words[0] == "model" and len(words) > 1 else words[0]] += count
        places = parts
    return ", ".join(f"{place} (x {count})" if count > 1 else place for place, count in places.items())


def _beside_the_text(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """In a language model with towers for images or sound: all that is outside its decoder and no head of it."""
    config, getter = getattr(model, "config", None), getattr(model, "get_decoder", None)
    if getter is None or getattr(config, "is_encoder_decoder", True) or not hasattr(config, "get_text_config"):
        return set()
    try:
        text, decoder = config.get_text_config(), getter()  # pyright: ignore[reportOptionalMemberAccess]
    except (ValueError, AttributeError):  # several texts: no part of it is the text's alone
        return set()
    if text is config or decoder is model or not isinstance(decoder, nn.Module) or kind_of(decoder) != "model":
        return set()
    inside = {id(module) for module in walk.modules(decoder).values()} | {id(model)}
    return {path for path, module in modules.items() if id(module) not in inside} - heads(model, modules)


def heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the head: the output embeddings and, in a transformers model, all that stands outside its base."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    found = {path for path, module in modules.items() if module is head}
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        inside = {id(module) for module in walk.modules(body).values()}
        found |= {path for path, module in modules.items() if id(module) not in inside}
    return found
