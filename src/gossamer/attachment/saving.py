"""What transformers' own ways to save a model do while adapters are attached: no adapter is lost without a word.

A model's `save_pretrained` would write the base, which nobody changed, and Trainers save by calling it. While adapters
are attached, the model has another one, an attribute of this one model as its modules' `forward` is: it writes the
adapters, in PEFT's layout, and no base. While they are merged the weights say it all, and it writes those.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter
from gossamer.attachment.host import SAVING, Host
from gossamer.attachment.walk import CONTAINER
from gossamer.errors import StateError, UnsupportedError
from gossamer.quant import QuantizedLinear


class Saving:
    """The saving methods of one model that has adapters."""

    def __init__(self, host: Host, capture: Callable[..., Adapter]) -> None:
        self.host, self.capture = host, capture

    def stand_in(self) -> None:
        """Take the place of the model's own methods, where it has them."""
        for name in SAVING:
            if callable(getattr(type(self.host.model), name, None)):
                self.host.model.__dict__[name] = getattr(self, name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the attached adapters; while merged, the model with the merged weights.

        One adapter stands in the folder itself, several each in a folder of its name. Files of other names are left.

        Raises: StateError to publish. UnsupportedError for weights that are sharded, or merged ones beside codes.
        """
        if push_to_hub:
            self.push_to_hub()
        host = self.host
        if host.stash is not None:
            self._save_merged(save_directory, is_main_process, state_dict, options)
            return
        if any(type(parameter).__name__ == "DTensor" for parameter in host.model.parameters()):
            raise UnsupportedError(
                "the weights are spread over several processes, so save_pretrained sees parts of them"
            )
        if not is_main_process:
            return
        for name in host.adapters:
            folder = Path(save_directory) if len(host.adapters) == 1 else Path(save_directory, name)
            self.capture(host.model, name).save(folder, beside=True)

    def push_to_hub(self, *args: Any, **options: Any) -> None:
        """Refuse to publish: neither card nor base's name are known here. Raises `StateError`."""
        raise StateError(
            "a model with attached adapters is not published as a whole",
            got=", ".join(self.host.adapters),
            hint="gs.capture(model, name).save(folder), then `gossamer push folder owner/name`",
        )

    def _save_merged(self, folder: Any, main: bool, given: Mapping[str, Tensor] | None, options: Any) -> None:
        model: Any = self.host.model
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise UnsupportedError(
                "merged weights stand beside codes, and a plain model folder cannot hold both",
                hint="gs.merge(model, keep=False), or gs.capture(model, name).save(folder) for the adapter alone",
            )
        stored = model.state_dict() if given is None else given
        plain = {name: value for name, value in stored.items() if CONTAINER not in name.split(".")}
        type(model).save_pretrained(model, folder, is_main_process=main, state_dict=plain, **options)
