"""What tasks over the next token share: causal models, proven masks, the head at supervised positions alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.data.batches import Batch, BatchLayout, collate
from gossamer.data.masks import Encoding, encode
from gossamer.data.rows import Chat, Completion, Instruction, Row, Text
from gossamer.errors import NonFiniteError
from gossamer.training.loss import refuse_unless_causal, supervised_nll
from gossamer.training.tasks.task import LOSS, EncodingOptions, LearnedExample, Measure, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PER_TOKEN = "nats per token"
NATS = Measure(LOSS, PER_TOKEN)


class LanguageTask(Task):
    """The loss is the negative log-likelihood of the supervised tokens: `-sum ln p(token | tokens before it)`."""

    rows = (Chat, Completion, Instruction, Text)
    loss_unit = PER_TOKEN

    def fits(self, model: nn.Module) -> None:
        """Raise `UnsupportedError` unless the model predicts each token from those before it alone."""
        refuse_unless_causal(model)

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, options: EncodingOptions) -> Encoding:
        """Token ids with proven masks: the answers are supervised, with the token that ends them."""
        return encode(rows, processor, **vars(options))

    def collate(self, examples: Sequence[Any], layout: BatchLayout) -> Batch:
        """Packed or padded."""
        return collate(examples, layout.pad_id, layout.device, packed=layout.packed, shared=layout.shared)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum over the supervised tokens of each example of `-ln p(token)`, in nats."""
        return batch.by_example(supervised_nll(model, batch))

    def remarks(
        self, examples: Encoding, processor: PreTrainedTokenizerBase, model: PreTrainedModel | None
    ) -> list[str]:
        """Which tokens the answers end with, and whether generation stops there."""
        last = {
            next(token for token, on in zip(one.ids[::-1], one.supervised[::-1], strict=True) if on) for one in examples
        }
        ends = sorted(last & {id for id, token in processor.added_tokens_decoder.items() if token.special})
        eos: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own: Any = processor.eos_token_id
        stops = {*(eos if isinstance(eos, list) else [eos]), own} - {None}

        def listed(ids: Iterable[Any]) -> str:
            return ", ".join(str(processor.convert_ids_to_tokens(one)) for one in sorted(ids)) or "nothing"

        line = f"answers are learned with the token they end with: {listed(ends)}" if ends else ""
        if model is not None and (unheeded := {*ends} - stops):
            line += (f". Generation does not stop at {listed(unheeded)} but at {listed(stops)}: "
                     "add it to eos_token_id of the generation config")  # fmt: skip
        return [line] if line else []


def finite(numbers: Tensor, examples: Sequence[LearnedExample], indices: Sequence[int]) -> Tensor:
    """The numbers, unless one of them is NaN or infinite: then `NonFiniteError` names the rows."""
    if not torch.isfinite(numbers).all():
        places = ", ".join(examples[index].where for index in indices)
        raise NonFiniteError("the model's output is not finite", where=places)
    return numbers
