"""A tokenizer that is not the base's own goes with the adapter; the base's own does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gossamer.models import tiny_tokenizer
from gossamer.training.runs.outcome import keep_tokenizer
from tests.training.toy_run import toy_config, toy_train


def changed(tokenizer, how: str):
    if how == "token":
        tokenizer.add_tokens(["<new>"])
    elif how == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    elif how == "template":
        tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


@pytest.mark.parametrize("how", ["token", "special", "template"])
def test_what_was_changed_is_kept_and_reads_back(tmp_path: Path, how: str):
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tokenizer = changed(AutoTokenizer.from_pretrained(tmp_path / "base"), how)
    assert keep_tokenizer(tokenizer, tmp_path / "adapter")
    back = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.chat_template == tokenizer.chat_template


def test_the_base_s_own_is_not_kept(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert not keep_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_run_leaves_one_that_came_from_nowhere(tmp_path: Path):
    run = toy_train(toy_config(tmp_path, max_steps=1, epochs=None))
    assert (run.output / "adapter" / "tokenizer.json").exists()
