"""Vectors of texts, each row with its own adapter: encoders, and decoders that are used as such.

    e = pool(h_1 .. h_T)        h: the last hidden states, from below the head
    e / |e|                     where vectors are normalised

How to pool is what the model's own sentence-transformers files say (modules.json and the pooling's config.json), if it
has them: the mean over the tokens, the first token, the last, or the largest of each column.
"""

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import attach, detach, use, using
from gossamer.attachment import attached as names_attached
from gossamer.attachment.host import require_host
from gossamer.attachment.walk import modules
from gossamer.errors import BaseFileError, NonFiniteError, StateError, UnsupportedError, UsageError
from gossamer.files.places import adapter_of
from gossamer.models import load_base
from gossamer.models.language import positions, text_config
from gossamer.models.locate import locate
from gossamer.serving.folder import Folder
from gossamer.serving.store import AdapterStore, Placed

Pooling = Literal["mean", "cls", "last", "max"]

POOLS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda states, there: (states * there).sum(1) / there.sum(1),
    "cls": lambda states, _: states[:, 0],
    "last": lambda states, there: states[torch.arange(len(states)), there.sum(1).long()[:, 0] - 1],
    "max": lambda states, there: states.masked_fill(there == 0, -torch.inf).amax(1),
}
"""Of states (B, T, D) with `there` (B, T, 1), 1 at tokens and 0 at padding: (B, D)."""
_FIELDS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "max_tokens": "max"}
"""In a pooling's config `pooling_mode_<field>`."""
_PLAIN_TEXT: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
"""What sentence_bert_config.json may say besides a length."""
_LARGEST_FILE = 2**20
_LONGEST_TEXT = 2**20


@dataclass(frozen=True)
class Bounds:
    """What one call may ask for, and what goes through the model at once.

    Attributes:
        texts, tokens: of a call. rows, padded: of a batch, padding counted.
    """

    texts: int = 2048
    tokens: int = 300_000
    rows: int = 64
    padded: int = 8192


class Embeddings(NamedTuple):
    """Vectors, and what they were made with.

    Attributes:
        vectors: (texts, width) float32, in the order of the texts.
        tokens: of each text, special ones counted.
        digests: name -> digest of every adapter that was used.
    """

    vectors: Tensor
    tokens: tuple[int, ...]
    digests: Mapping[str, str]


class ModelTarget:
    """Attaches adapters to a model, for vectors of its body."""

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        self.model, self.body = model, body

    def place(self, name: str, number: int, adapter: Adapter) -> Placed:
        """Attach it. Raises what `attach` raises, and `UnsupportedError` where it changes nothing in the body."""
        attach(self.model, adapter, _inner(number))
        inside = {*modules(self.body).values()} - {self.model}
        here = modules(self.model)
        if not any(here[path] in inside for path in require_host(self.model).layers_of(_inner(number))):
            self.remove(number)
            raise UnsupportedError("an adapter that changes no vector", where=name, got=adapter.spec.name)
        use(self.model, None)
        return Placed(size=sum(held.nbytes for slots in adapter.tensors.values() for held in slots.values()))

    def remove(self, number: int) -> None:
        """Detach it."""
        detach(self.model, _inner(number))


def _inner(number: int) -> str:
    """What an adapter is called on the model: its name may hold what no adapter there may be called."""
    return f"adapter-{number}"


class Embedder:
    """A base that gives vectors, and its adapters. Used from one thread.

    Args:
        base: what `load_base` takes, or a model and its tokenizer.
        adapters: names -> values or folders; or a folder whose subfolders are adapters, named as they are.
        pooling, normalise: None for what the base's own files say, else the mean, normalised.
        bounds: of a call and of a batch.
        loading: quant, dtype, device, as `load_base` takes them.

    Raises: UnsupportedError for an encoder-decoder and for sentence-transformers modules that are not known here;
        BaseFileError for files of those that cannot be read; StateError for a base that has adapters attached.
    """

    def __init__(
        self,
        base: str | Path | tuple[Any, Any],
        adapters: str | Path | Mapping[str, Adapter | Path | str] | None = None,
        *,
        pooling: Pooling | None = None,
        normalise: bool | None = None,
        bounds: Bounds | None = None,
        **loading: Any,
    ) -> None:
        if pooling is not None and pooling not in POOLS:
            raise UsageError("no such pooling", got=str(pooling), expected=", ".join(POOLS))
        style = PoolingStyle() if isinstance(base, tuple) else style_of(locate(base))
        loaded: tuple[Any, Any] = base if isinstance(base, tuple) else load_base(base, **loading)
        self.model, self.tokenizer = loaded
        if names := names_attached(self.model):
            raise StateError("vectors are of a base as it is", got=f"attached: {', '.join(names)}", hint="detach")
        if style.as_chat and self.tokenizer.chat_template:
            raise UnsupportedError(
                "sentence-transformers puts this model's texts through its tokenizer's chat template",
                where=str(base),
                hint='if it was trained on plain texts, let sentence_bert_config.json say so: "modality_config": '
                '{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}',
            )
        self.model.eval()
        self.body: Any = self.model.base_model
        self.takes = {*inspect.signature(self.body.forward).parameters}
        if getattr(self.model.config, "is_encoder_decoder", False) or not {"input_ids", "attention_mask"} <= self.takes:
            raise UnsupportedError("a model that gives no vectors here", got=type(self.model).__name__)
        if "pixel_values" in self.takes:
            raise UnsupportedError("a model that sees gives no vectors here", got=type(self.model).__name__)
        self.pooling, self.bounds = pooling or style.pooling, bounds or Bounds()
        self.normalise = style.normalise if normalise is None else normalise
        self.prompt = style.prompt
        self.longest = min(positions(self.model) or 2**31, style.longest or 2**31)
        self.mixes = True
        self.store = AdapterStore(self.model, self.tokenizer, ModelTarget(self.model, self.body), math.inf)
        self.folder = Folder(adapters) if isinstance(adapters, str | Path) else None
        """That its adapters came from."""
        named = adapters if isinstance(adapters, Mapping) else {}
        for name, source in (self.folder.adapters() if self.folder else named).items():
            self.register(name, source)

    # Adapters --------------------------------------------------------------------------------------------------

    @property
    def digests(self) -> dict[str, str]:
        """Of its adapters, by name."""
        return {version.name: version.last.digest for version in [*self.store.versions.values()] if version.last}

    def names(self) -> list[str]:
        """All that are known, sorted."""
        return self.store.names()

    def register(self, name: str, source: Adapter | Path | str) -> None:
        """Make a name known, or mean something else from now on.

        Raises: what reading and attaching an adapter raises, and UnsupportedError for virtual tokens, which are not
            below the head; the name then means what it meant before.
        """
        self.store.put(self.store.prepare(name, source if isinstance(source, Adapter) else adapter_of(source)))

    def unregister(self, name: str) -> None:
        """Forget a name. Raises `UsageError` for one that is not known."""
        self.store.unregister(name)

    def close(self) -> None:
        """Leave the model as it was."""
        for name in self.names():
            self.unregister(name)
        self.store.close()

    # Vectors ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        adapters: str | None | Sequence[str | None] = None,
        *,
        dimensions: int | None = None,
    ) -> Embeddings:
        """A vector for each text; the same, but for rounding, whatever else is asked for in the same call.

        Args:
            texts: or token ids, which are taken as they are.
            adapters: one for all, or one for each text; None is the base.
            dimensions: keep so many of the first (for models that were trained for it).

        Raises: UsageError for an unknown adapter, an empty or too long text, ids that are no tokens, and more than the
            bounds allow; NonFiniteError.
        """
        each = [adapters] * len(texts) if adapters is None or isinstance(adapters, str) else [*adapters]
        if len(each) != len(texts):
            raise UsageError("one adapter a text", got=f"{len(each)} adapters", expected=str(len(texts)))
        width = text_config(self.model.config).hidden_size
        if dimensions is not None and not 1 <= dimensions <= width:
            expected = f"1 to {width:,}"
            raise UsageError("out of range", where="dimensions", got=str(dimensions), expected=expected)
        held = self.store.hold(dict.fromkeys(name for name in each if name is not None))
        try:
            loaded = {one.name: self.store.take(one) for one in held}
            ids = self._tokens(texts)
            found = torch.empty(len(ids), width)
            for chosen in self._batches(ids):
                rows = [None if (name := each[one]) is None else _inner(loaded[name].number) for one in chosen]
                found[chosen] = self._run([ids[one] for one in chosen], rows)
        finally:
            self.store.let_go(held)
        if not (fine := found.isfinite().all(1)).all():
            one = fine.tolist().index(False)
            raise NonFiniteError("a vector is not finite", where=f"text {one}", got=each[one] or "the base")
        found = found[:, :dimensions]
        if self.normalise:
            found = nn.functional.normalize(found, dim=1)
        return Embeddings(found, tuple(map(len, ids)), {name: loaded[name].digest for name in sorted(loaded)})

    def _tokens(self, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Ids of each text, checked."""
        if not 0 < len(texts) <= self.bounds.texts:
            expected = f"1 to {self.bounds.texts:,}"
            raise UsageError("so many texts are not taken at once", got=f"{len(texts):,}", expected=expected)
        found: list[list[int]] = []
        size = self.model.get_input_embeddings().weight.shape[0]
        for number, text in enumerate(texts):
            if isinstance(text, str) and len(text) > _LONGEST_TEXT:
                raise UsageError("a text is too long", where=f"text {number}", got=f"{len(text):,} characters")
            ids = [*self.tokenizer(self.prompt + text)["input_ids"]] if isinstance(text, str) else [*text]
            if not 0 < len(ids) <= self.longest or not text:
                got, expected = f"{len(ids):,} tokens", f"1 to {self.longest:,}"
                raise UsageError("a text of an impossible length", where=f"text {number}", got=got, expected=expected)
            if wrong := [one for one in ids if not isinstance(one, int) or not 0 <= one < size]:
                expected = f"0 to {size - 1:,}"
                raise UsageError("no such token", where=f"text {number}", got=str(wrong[0]), expected=expected)
            found.append(ids)
        total = sum(map(len, found))
        if total > self.bounds.tokens:
            got, expected = f"{total:,} tokens", f"at most {self.bounds.tokens:,}"
            raise UsageError("too much is asked for at once", got=got, expected=expected)
        return found

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of the texts that go through the model together: of similar length, the longest first."""
        left = sorted(range(len(ids)), key=lambda one: -len(ids[one]))
        while left:
            count = max(1, min(self.bounds.rows, self.bounds.padded // len(ids[left[0]])))
            yield left[:count]
            left = left[count:]

    def _run(self, ids: Sequence[Sequence[int]], rows: Sequence[str | None]) -> Tensor:
        """(rows, width) of one batch, each row with its own adapter."""
        if len({*rows}) == 1:
            return self._pooled(ids, rows[0])
        if self.mixes:
            try:
                return self._pooled(ids, [*rows])
            except StateError:  # a model that does not keep rows apart, as OPT does not within its layers
                self.mixes = False
        found = torch.empty(len(ids), text_config(self.model.config).hidden_size)
        for name in dict.fromkeys(rows):
            own = [row for row, other in enumerate(rows) if other == name]
            found[own] = self._pooled([ids[row] for row in own], name)
        return found

    def _pooled(self, ids: Sequence[Sequence[int]], adapters: str | None | list[str | None]) -> Tensor:
        """One run of the model, padded on the right."""
        device = self.body.device
        padding = self.tokenizer.pad_token_id or 0
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], True, padding).to(device)
        there = (torch.arange(tokens.shape[1]) < torch.tensor([len(one) for one in ids])[:, None]).to(device)
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": there.long()}
        if "use_cache" in self.takes:
            given["use_cache"] = False
        with using(self.model, adapters) if adapters else contextlib.nullcontext():
            states: Tensor = self.body(**given).last_hidden_state
        return POOLS[self.pooling](states.float(), there.unsqueeze(-1).float()).cpu()


class PoolingStyle(NamedTuple):
    """How a text becomes a vector.

    Attributes:
        longest: tokens of a text at most. prompt: what stands before every text.
        as_chat: whether sentence-transformers would put texts through a chat template, if the tokenizer has one.
    """

    pooling: Pooling = "mean"
    normalise: bool = True
    longest: int | None = None
    prompt: str = ""
    as_chat: bool = False


def style_of(base: Path) -> PoolingStyle:
    """What sentence-transformers' files beside a model say; the mean, normalised, where there are none.

    Raises: UnsupportedError for what they say beyond that; BaseFileError for files that cannot be read.
    """
    if not (base / "modules.json").is_file():
        return PoolingStyle()
    listed = [part for part in _read(base / "modules.json", list) if isinstance(part, dict)]
    parts = [(str(part.get("type", "")).rpartition(".")[2], str(part.get("path", ""))) for part in listed]
    kinds = [kind for kind, _ in parts]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or parts[0][1]:
        expected = "a Transformer in the folder itself, a Pooling, and perhaps a Normalize"
        got = ", ".join(f"{kind} in {path or 'the folder'}" for kind, path in parts)
        raise UnsupportedError("sentence-transformers modules", where=str(base), got=got, expected=expected)
    place = base / parts[1][1] / "config.json"
    if base.resolve() not in place.resolve().parents:
        raise BaseFileError("a module outside of the model's folder", where=str(base), got=parts[1][1])
    pooling, text = _read(place, dict), _optional(base / "sentence_bert_config.json")
    longest, prompt = text.pop("max_seq_length", None), _prompt(base / "config_sentence_transformers.json")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise BaseFileError("not a length", where=f"{base}: max_seq_length", got=str(longest))
    unknown = [name for name, value in text.items() if value and value != _PLAIN_TEXT.get(name)]
    if prompt and pooling.get("include_prompt") is False:
        unknown.append("include_prompt: false")
    if unknown:
        raise UnsupportedError("a setting of sentence-transformers", where=str(base), got=", ".join(unknown))
    as_chat = "modality_config" not in text
    return PoolingStyle(_pooling(pooling, place), "Normalize" in kinds, longest, prompt, as_chat)


def _prompt(file: Path) -> str:
    about = _optional(file)
    name, known = about.get("default_prompt_name"), about.get("prompts")
    if name is None:
        return ""
    if not isinstance(known, dict) or not isinstance(known.get(name), str):
        raise BaseFileError("no such prompt", where=str(file), got=str(name))
    return known[name]


def _pooling(config: Mapping[str, Any], place: Path) -> Pooling:
    prefix = "pooling_mode_"
    named = [name.removeprefix(prefix) for name, value in config.items() if name.startswith(prefix) and value is True]
    found: list[Any] = [_FIELDS.get(name, name) for name in named]
    if isinstance(config.get("pooling_mode"), str):
        found = [config["pooling_mode"].replace("lasttoken", "last")]
    if len(found) != 1 or found[0] not in POOLS:
        expected = f"one of {', '.join(POOLS)}"
        raise UnsupportedError("a way of pooling", where=str(place), got=", ".join(found) or "none", expected=expected)
    return found[0]


def _optional(file: Path) -> dict[str, Any]:
    return _read(file, dict) if file.is_file() else {}


def _read(file: Path, kind: type) -> Any:
    """A small JSON file whose outermost value is of a kind."""
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise BaseFileError("too large to be a config", where=str(file))
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseFileError("a config that cannot be read", where=str(file), got=str(error)) from error
    if not isinstance(value, kind):
        raise BaseFileError("a config of another form", where=str(file), got=type(value).__name__)
    return value
