"""What every test starts from: no network, one thread, repeatable examples, a toy of each architecture."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, hence before everything else

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel

from gossamer.models import tiny

torch.set_num_threads(1)
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@cache
def _original(architecture: str) -> PreTrainedModel:
    return tiny(architecture)


@pytest.fixture(scope="session")
def toy() -> Callable[[str], PreTrainedModel]:
    """`toy("llama")`: a fresh copy of a seeded toy; equal names give bit-equal models."""
    return lambda architecture: copy.deepcopy(_original(architecture))
