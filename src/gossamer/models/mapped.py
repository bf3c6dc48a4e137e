"""A model whose parameters are views of its files: every number is there, and none of them is in memory."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gossamer.attachment.walk import NOTED, base_parameters, fingerprint, identity, modules
from gossamer.errors import UnsupportedError
from gossamer.files.shards import Shard, shards_of
from gossamer.models.load import LOCAL, as_base_error, model_class, require_exact, without_load_report
from gossamer.models.scrutiny import read_config, require_plain_weights
from gossamer.models.write import without_bars
from gossamer.quant import sampled_places


class Place(NamedTuple):
    """Where a parameter is stored: a file of the folder, and the tensor's name in it."""

    file: str
    name: str


@dataclass
class Mapped:
    """A model and the files that its parameters are views of.

    Attributes:
        folder: where the files lie.
        model: in eval mode, its weights in the dtypes of the files.
        shards: file name -> file.
        places: canonical name of a parameter -> where it is stored. Parameters that the files hold in other shapes than
            the model (experts one by one that the model stacks) are not among them: they are in memory.
    """

    folder: Path
    model: PreTrainedModel
    shards: dict[str, Shard]
    places: dict[str, Place]

    def stored(self, place: Place) -> Tensor:
        """The view of a stored tensor."""
        return self.shards[place.file].tensors[place.name]

    def forget(self, *parameters: str) -> None:
        """Give back the memory that these parameters were read into."""
        for name in parameters:
            place = self.places.get(name)
            if place is not None:
                self.shards[place.file].forget(self.stored(place))


def mapped_model(folder: str | Path) -> Mapped:
    """Open a transformers folder without reading its weights.

    Raises: BaseFileError for what is no plain, whole folder of safetensors; UnsupportedError for one that is stored
        quantised.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise UnsupportedError("quantised weights cannot be used where they lie", where=str(folder))
    require_plain_weights(folder)
    with as_base_error(folder), without_bars(), without_load_report():
        shards = shards_of(folder)
        stored = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
        described = AutoConfig.from_pretrained(folder, **LOCAL)
        kind: Any = model_class(config)
        if kind is AutoModelForCausalLM:  # which wants a folder, and would read it
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(described)]
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        options |= {"config": described, "state_dict": dict(stored), "dtype": _commonest(stored)}
        model, info = kind.from_pretrained(None, **options)
        require_exact(info, folder)
    mapped = Mapped(folder, model.eval(), shards, _places(model, shards))
    vars(model)[NOTED] = fingerprint(model, _identities(mapped))
    return mapped


def _identities(mapped: Mapped) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """The identity of every parameter; a few pages of each are read, all at once."""
    views = [(mapped.shards[place.file], mapped.stored(place)) for place in mapped.places.values()]
    for shard, stored in views:
        shard.ahead_at(stored, sampled_places(stored))
    seen = {}
    for name, parameter in base_parameters(mapped.model):
        seen[name] = identity(parameter)
        mapped.forget(name)
    for shard, stored in views:
        shard.in_order(stored)
    return seen


def _commonest(stored: dict[str, Tensor]) -> torch.dtype:
    """The dtype of most numbers: transformers keeps views of that dtype, and copies what it has to convert."""
    count: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        count[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    return count.most_common(1)[0][0]


@torch.no_grad()
def _places(model: nn.Module, shards: dict[str, Shard]) -> dict[str, Place]:
    """Every parameter that is a view of a stored tensor; copies of another dtype are made views again."""
    stored = {Place(file, name): tensor for file, shard in shards.items() for name, tensor in shard.tensors.items()}
    by_address = {tensor.data_ptr(): place for place, tensor in stored.items() if tensor.numel()}
    by_name = {place.name: place for place in stored}
    found: dict[str, Place] = {}
    for path, module in modules(model).items():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}" if path else name
            place = by_address.get(parameter.data_ptr())
            if place is None and full in by_name and stored[by_name[full]].shape == parameter.shape:
                place = by_name[full]
                parameter.data = stored[place]
            if place is not None:
                found[full] = place
    return found
