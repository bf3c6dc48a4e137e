"""What a step of training computes, on fake tensors: inputs of a size, through the model, to one number.

A loss is any callable `(model, setting) -> Tensor`, which makes its inputs itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.kernels.losses import head_nll, token_nll
from gossamer.kernels.packed import NO_MASK, Packing, Segment
from gossamer.planning.setting import TrainingSetting

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
