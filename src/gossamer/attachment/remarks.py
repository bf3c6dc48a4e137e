"""What an attach says of a stored adapter that fits and still may not be what somebody thinks it is."""

import inspect
import re
import warnings
from typing import Any

from torch import nn

from gossamer.adapter import Adapter

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
"""PEFT's task, by how transformers calls a class. Those of classifiers are left out: with one PEFT looks for a trained
head in the file, whether there is one or not; the class by its name opens both."""


def idle_note(adapter: Adapter) -> list[str]:
    """A note that counts the modules at which the adapter changes nothing, if there are any."""
    idle, paths = adapter.idle_paths, [path for path in adapter.paths if path]
    if not idle:
        return []
    if len(idle) == len(paths):
        return [f"note: this adapter changes nothing: its change is zero at all {len(paths)} modules"]
    return [f"note: the change is zero at {len(idle)} of {len(paths)} modules, {idle[0]} the first"]


def warn_of_other_base(model: nn.Module, adapter: Adapter) -> None:
    """Warn where an adapter without a fingerprint names another base than the model was loaded from."""
    theirs = base_name(adapter.foreign.get("base_model_name_or_path"))
    ours = base_name(getattr(getattr(model, "config", None), "_name_or_path", None))
    if adapter.base is None and theirs and ours and _last(theirs) != _last(ours):
        warnings.warn(
            f"the adapter says that its base is {theirs}, and it is attached to {ours}, whose shapes fit too",
            stacklevel=4,
        )


def described(model: nn.Module) -> dict[str, Any]:
    """What PEFT's config says of a base, for its own loaders: name, task, and the class where no task says it."""
    config, kind = getattr(model, "config", None), type(model)
    task = next((task for ending, task in _TASKS.items() if kind.__name__.endswith(ending)), None)
    text = {"input_ids", "inputs_embeds"} <= inspect.signature(
        kind.forward
    ).parameters.keys()  # PEFT's wrapper passes both
    if text and kind.__name__.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        task = "SEQ_2_SEQ_LM"
    elif text and task is None and kind.__module__.startswith("transformers.") and kind.__name__.endswith("Model"):
        task = "FEATURE_EXTRACTION"
    known = task is None and config is not None
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__} if known else None
    name = base_name(getattr(config, "_name_or_path", None)) or None
    return {"base_model_name_or_path": name, "task_type": task, "auto_mapping": mapping}


def base_name(name: Any) -> str:
    """A base's id or path; for a snapshot in the hub's cache the id."""
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", name) if isinstance(name, str) else None
    return f"{found[1]}/{found[2]}" if found else str(name or "")


def _last(name: str) -> str:
    """What a folder and an id have in common: the last part."""
    return re.split(r"[/\\]+", name.rstrip("/\\"))[-1].lower()
