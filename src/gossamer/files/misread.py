"""What PEFT makes of a file of ours that it does not read as it stands.

transformers 5 stacks the experts of a mixture, which were linear modules before. PEFT 0.21 therefore takes a target
whose name an expert's matrix had (`gate_proj`) for the stacked matrix of all experts, in every architecture whose old
files transformers converts so. Dense layers and shared experts of such a model have modules of those names too: PEFT
looks for stacked factors instead of theirs, and drops theirs without an error. No config says otherwise.
"""

import warnings
from collections.abc import Iterable
from functools import cache

_STACKED = ("gate_up_proj", "down_proj")
_ROUTER = "gate"
_FOLLOWED = ("mixtral", "qwen2_moe")
"""The styles of old experts that PEFT's config follows, as transformers calls them."""
_LIKELY = {_ROUTER, "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names without which no architecture need be looked up."""


def warn_of_misreading(architecture: str, targets: Iterable[str], where: str) -> None:
    """Warn of the adapted modules, by path, that PEFT would drop."""
    targets = [*targets]
    likely = {path.rpartition(".")[2] for path in targets} & _LIKELY
    names = expert_names(architecture) if likely and architecture else frozenset()
    dropped = [path for path in targets if path.rpartition(".")[2] in names]
    if dropped:
        warnings.warn(
            f"{where}: PEFT 0.21 takes {len(dropped)} of the {len(targets)} adapted modules for stacked experts "
            f"and drops their factors, {dropped[0]} the first; for PEFT leave them out (exclude_modules), or merge",
            stacklevel=5,
        )


@cache
def expert_names(architecture: str) -> frozenset[str]:
    """Names of linear modules that PEFT takes for stacked experts' in a model of this class."""
    try:
        from transformers import conversion_mapping
        from transformers.models.auto import modeling_auto
    except ImportError:  # an older transformers converts nothing
        return frozenset()
    styles = dict(getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})) | {"mixtral": "mixtral"}
    tables = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    kinds = {
        kind
        for table in tables
        for kind, known in table.items()
        if architecture == known or (isinstance(known, tuple) and architecture in known)
    }
    followed = {styles[kind] for kind in kinds if styles.get(kind) in _FOLLOWED}
    return frozenset(name for style in followed for name in _converted(style))


def _converted(style: str) -> set[str]:
    """The old names of the matrices that the conversion of a style stacks; the router's with them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found: set[str] = set()
    for one in get_checkpoint_conversion_mapping(style) or ():
        targets = [*getattr(one, "target_patterns", ())]
        if len(targets) == 1 and targets[0].endswith(_STACKED) and "expert" in targets[0]:
            found |= {source.removesuffix(".weight").rpartition(".")[2] for source in one.source_patterns}
    return found | {_ROUTER}
