"""What a model says of its language half: the place in a config, and how long a row it can read."""

from typing import Any

from torch import nn

from gossamer.attachment.walk import modules


def text_config(config: Any) -> Any:
    """The part of a transformers config that is about text: a model that also sees or hears has it inside another.

    It is the config itself where there is no such part, or where several could be meant.
    """
    part = getattr(config, "get_text_config", None)
    try:
        return part(decoder=True) if callable(part) else config
    except ValueError:  # transformers' word for several
        return config


def positions(model: nn.Module) -> int | None:
    """Tokens of a row that the model has positions for; None where its config states no limit."""
    room = getattr(text_config(getattr(model, "config", None)), "max_position_embeddings", None)
    if not isinstance(room, int):
        return None
    for path, table in modules(model).items():  # RoBERTa counts from behind the padding's id
        if path.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return min(room, table.num_embeddings) - table.padding_idx - 1
    return room
