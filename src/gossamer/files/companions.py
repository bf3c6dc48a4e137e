"""What lies beside an adapter's weights and is its own there: tokenizer, chat template, processor, settings."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.files.folder import read_json

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Two files and a folder of files."""
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
CHAT = (*TOKENIZER, *TEMPLATES, GENERATION)
"""Those that say how chats are written, and when an answer ends."""
NAMES = (*TOKENIZER, *TEMPLATES, *SETTINGS)
"""Files, and one folder, that are an adapter's own where they lie beside it."""


def held(folder: Path, names: Sequence[str] = NAMES) -> list[str]:
    """Which companions a folder holds."""
    return [name for name in names if (folder / name).exists()]


def is_companion(path: str, names: Sequence[str] = NAMES) -> bool:
    """Whether a file is one, by its path in the adapter's folder."""
    folder, _, name = path.rpartition("/")
    return path in names if not folder else folder in names and folder == TEMPLATES[2] and name.endswith(".jinja")


def files_in(folder: Path, names: Sequence[str] = NAMES) -> list[Path]:
    """Every file of a folder's companions, sorted."""
    found = [*folder.iterdir(), *folder.glob(f"{TEMPLATES[2]}/*")] if folder.is_dir() else []
    return sorted(one for one in found if one.is_file() and is_companion(one.relative_to(folder).as_posix(), names))


def contents_of(folder: Path) -> dict[str, bytes]:
    """Path in the folder -> content of every companion."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}


def write(contents: dict[str, bytes], folder: Path) -> None:
    """Put companions into a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def remove(folder: Path, names: Sequence[str] = NAMES) -> None:
    """Delete what a folder holds of them."""
    for name in held(folder, names):
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)


def has_template(folder: Path) -> bool:
    """Whether a folder says how chats are written."""
    return bool(held(folder, TEMPLATES)) or bool(_settings(folder).get("chat_template"))


def overlay(adapter: Path, place: Path) -> None:
    """Put an adapter's companions over its base's: a whole tokenizer replaces all of it, a template any other one."""
    if held(adapter, VOCABULARIES):
        remove(place, (*TOKENIZER, *TEMPLATES))
    elif has_template(adapter):
        remove(place, TEMPLATES)
        settings = _settings(place)
        if settings.pop("chat_template", None):
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            (place / "tokenizer_config.json").write_text(text, encoding="utf-8")
    write(contents_of(adapter), place)


def rules_of(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer of the fast kind does to a text, by part; empty for another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    return {name: parts[name] for name in parts if name not in ("padding", "truncation")}  # set by batches


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}
