"""What lies beside an adapter's weights and is its own there: tokenizer, chat template, processor, settings."""

from __future__ import annotations

from pathlib import Path

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
VOCABULARIES += ("sentencepiece.bpe.model", "tekken.json")
TOKENIZER = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERATION = "generation_config.json"
SETTINGS = {
    GENERATION: "generation config",
    "preprocessor_config.json": "processor",
    "processor_config.json": "processor",
    "video_preprocessor_config.json": "processor",
}
NAMES = (*TOKENIZER, *TEMPLATES, *SETTINGS)
"""Files, and one folder, that are an adapter's own where they lie beside it."""


def held(folder: Path) -> list[str]:
    """Which companions a folder holds."""
    return [name for name in NAMES if (folder / name).exists()]
