"""Gossamer: low-rank adaptation, end to end. One frozen model, any number of thin layers.

Importing this package loads nothing heavy; torch is imported when a name that needs it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer import moved
from gossamer.lazy import homes, lazy

__version__ = "0.1.0"

_HOME = homes(
    {
        "adapter": "Adapter",
        "attachment": "InjectionReport active attach attached base_fingerprint capture detach eva loftq "
        "merge trainable_parameters unmerge use using",
        "errors": "AdapterFileError BaseMismatchError GossamerError SharedWeightError SpecError TargetError",
        "merging": "as_lora combine extract learned_weights merge_into_base",
        "methods": "BitFit DoRA FullTuning Houlsby IA3 Lin LoRA NormTuning PrefixTuning PromptTuning VeRA",
        "models": "fetch load_base quantize_base",
        "planning": "ModelShape Plan plan",
        "quant": "quantize_model",
        "serving": "Engine generate",
        "training": "Job RunConfig TrainConfig evaluate train train_many",
    }
)
__getattr__ = lazy(__name__, _HOME)
__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from gossamer.adapter import Adapter as Adapter
    from gossamer.attachment import InjectionReport as InjectionReport
    from gossamer.attachment import active as active
    from gossamer.attachment import attach as attach
    from gossamer.attachment import attached as attached
    from gossamer.attachment import base_fingerprint as base_fingerprint
    from gossamer.attachment import capture as capture
    from gossamer.attachment import detach as detach
    from gossamer.attachment import eva as eva
    from gossamer.attachment import loftq as loftq
    from gossamer.attachment import merge as merge
    from gossamer.attachment import trainable_parameters as trainable_parameters
    from gossamer.attachment import unmerge as unmerge
    from gossamer.attachment import use as use
    from gossamer.attachment import using as using
    from gossamer.errors import AdapterFileError as AdapterFileError
    from gossamer.errors import BaseMismatchError as BaseMismatchError
    from gossamer.errors import GossamerError as GossamerError
    from gossamer.errors import SharedWeightError as SharedWeightError
    from gossamer.errors import SpecError as SpecError
    from gossamer.errors import TargetError as TargetError
    from gossamer.merging import as_lora as as_lora
    from gossamer.merging import combine as combine
    from gossamer.merging import extract as extract
    from gossamer.merging import learned_weights as learned_weights
    from gossamer.merging import merge_into_base as merge_into_base
    from gossamer.methods import IA3 as IA3
    from gossamer.methods import BitFit as BitFit
    from gossamer.methods import DoRA as DoRA
    from gossamer.methods import FullTuning as FullTuning
    from gossamer.methods import Houlsby as Houlsby
    from gossamer.methods import Lin as Lin
    from gossamer.methods import LoRA as LoRA
    from gossamer.methods import NormTuning as NormTuning
    from gossamer.methods import PrefixTuning as PrefixTuning
    from gossamer.methods import PromptTuning as PromptTuning
    from gossamer.methods import VeRA as VeRA
    from gossamer.models import fetch as fetch
    from gossamer.models import load_base as load_base
    from gossamer.models import quantize_base as quantize_base
    from gossamer.planning import ModelShape as ModelShape
    from gossamer.planning import Plan as Plan
    from gossamer.planning import plan as plan
    from gossamer.quant import quantize_model as quantize_model
    from gossamer.serving import Engine as Engine
    from gossamer.serving import generate as generate
    from gossamer.training import Job as Job
    from gossamer.training import RunConfig as RunConfig
    from gossamer.training import TrainConfig as TrainConfig
    from gossamer.training import evaluate as evaluate
    from gossamer.training import train as train
    from gossamer.training import train_many as train_many


def __dir__() -> list[str]:
    return sorted(__all__)


moved.install()
