"""What the columns of data files mean in this field, whoever reads them.

A column that a format does not read is either without meaning for learning (an id, a source), and then named as not
used; or it says something about what is to be learned, and then a row that fills it is refused. `REFUSED` is the table
of those. Names are compared as `plain` spells them, so that `Images` and `image-path` are found too.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gossamer.errors import nearest

SYSTEM = ("system", "system_prompt", "system_message")
"""A text that stands before the first turn."""
TOOLS = ("tools", "functions")
"""What the model may call: JSON schemas, or a JSON text of them."""
HISTORY = ("history",)
"""Earlier turns: a list of [question, answer]."""

_PICTURES = "leave those rows out, or remove the column if the text alone is to be learned"


class Meaning(NamedTuple):
    """A kind of column: its names, what it says, what to do, and which values of it change nothing."""

    names: tuple[str, ...]
    what: str
    hint: str
    harmless: Callable[[Any], bool] = lambda value: False


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, or a list or object of such. False and 0 say something."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, Sequence) and all(map(is_empty, value)))


def plain(name: str) -> str:
    """A column's name in lower case, with underscores."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _is_not_false(value: Any) -> bool:
    """Of a mark such as KTO's. A 0 may be the class of something else."""
    return value is not False and str(value).strip().lower() != "false"


def _is_one(value: Any) -> bool:
    return value == 1 or str(value).strip().lower() in ("1", "1.0", "true")


REFUSED = (
    Meaning(("image", "images", "image_path", "image_paths", "image_url", "image_urls", "img", "imgs", "picture",
             "pictures", "photo", "photos", "pixel_values", "pixels"), "pictures are not read yet", _PICTURES),
    Meaning(("video", "videos", "video_path", "video_paths", "video_url", "pixel_values_videos"),
            "videos are not read yet", _PICTURES),
    Meaning(("audio", "audios", "audio_path", "audio_paths", "speech", "waveform", "input_features", "input_values"),
            "sounds are not read yet", _PICTURES),
    Meaning(("attachment", "attachments"), "attached files are not read", _PICTURES),
    Meaning(("chosen", "rejected", "chosen_response", "rejected_response", "rejected_responses", "preferred",
             "dispreferred", "preferred_output", "non_preferred_output", "preference"),
            "a preference is not what sft learns",
            "keep the good answer alone, and remove the columns of the other"),
    Meaning(("label", "kto_tag", "desirable", "is_desirable", "accepted", "is_chosen"),
            "false marks an answer that is not to be learned", "leave those rows out, and remove the column",
            _is_not_false),
    Meaning(("weight", "weights", "sample_weight", "loss_weight", "importance"),
            "rows are not weighed", "leave rows of weight 0 out, repeat others, and remove the column", _is_one),
    Meaning(("train", "supervised"), "rows are not switched off by a column", "leave those rows out", _is_one),
    Meaning(("loss_mask", "assistant_masks", "assistant_mask", "completion_mask", "labels_mask"),
            "masks are made from the text", "remove the column; a turn's \"train\": false switches the turn off"),
    Meaning(("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "chain_of_thought", "cot"),
            "reasoning is not joined to the answer",
            "write it into the answer as the model should, such as <think>...</think>, or remove the column"),
    Meaning(("input", "context", "contexts", "passage", "passages", "document", "documents"),
            "what a question is asked about is not joined to the prompt",
            "write it into the prompt or the user's turn, or remove the column"),
    Meaning(("suffix", "middle", "prefix"), "texts are not filled in from both sides",
            "write the prompt as the model reads it, or remove the column"),
    Meaning(("chat_template_kwargs", "enable_thinking", "continue_final_message"),
            "settings of the chat template are not taken from rows", "remove the column"),
    Meaning((*SYSTEM, "system_instruction", "developer"), "no system text is read here",
            "name it 'system' beside turns or alpaca's columns, or write it into the prompt"),
    Meaning((*TOOLS, "tool_calls", "function_call", "available_tools"), "no tools are read here",
            "name it 'tools' beside turns or alpaca's columns, or write them into the prompt"),
    Meaning((*HISTORY, "previous_turns"), "no earlier turns are read here",
            "write them into the list of turns, or into the prompt"),
)  # fmt: skip
"""Columns that would change what is learned, where the format of the file does not read them."""
_MEANINGS = {name: meaning for meaning in REFUSED for name in meaning.names}
_PREFERENCE = _MEANINGS["rejected"]
_METADATA_OF_TEXTS = ("input", "label", "context", "contexts", "document", "documents", "passage", "passages", "prefix")
"""Beside a whole text these say something about it, and nothing that belongs to it is lost."""

_PLACEHOLDERS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}

_PROMPTS = ("question", "query", "input", "human", "source", "user", "request", "problem", "q")
_ANSWERS = ("answer", "response", "output", "target", "bot", "assistant", "reply", "solution", "summary", "gpt", "a",
            "label")  # fmt: skip
_TEXTS = ("content", "body", "sentence", "document", "article", "raw_text")
_CHATS = ("message", "conversation", "dialog", "dialogue", "dialogs", "dialogues", "chat", "chats", "turns")


def _meaning(name: str) -> Meaning | None:
    """What a column says, of those that `REFUSED` lists: also `image_2`, and `rejected_messages`."""
    if name.startswith(("chosen", "rejected")):
        return _PREFERENCE
    return _MEANINGS.get(name) or _MEANINGS.get(name.rstrip("0123456789").rstrip("_"))


class Carrying:
    """The columns of one file that its format does not read although they say what is to be learned."""

    def __init__(self, columns: Sequence[str], read: Sequence[str], format: str) -> None:
        known = {plain(name): name for name in read}
        self.meanings: dict[str, Meaning] = {}
        for column in columns:
            name = plain(column)
            copied = name == "input" and "instruction" in columns  # alpaca's, and the format was chosen by hand
            if column in read or copied or (format == "text" and name in _METADATA_OF_TEXTS):
                continue
            if name in known:
                rename = f"name it {known[name]!r}"
                self.meanings[column] = Meaning((name,), f"it is not spelt {known[name]!r}", rename)
            elif meaning := _meaning(name):
                self.meanings[column] = meaning
        plural = {f"{plain(column).rstrip('s')}s" for column in self.meanings}
        self.marks = [mark for name, mark in _PLACEHOLDERS.items() if name in plural]
        self.met: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self.meanings)

    def fault(self, record: Mapping[str, Any], texts: Iterable[str]) -> str:
        """Why the row would be learned wrongly, or `""`."""
        for column, meaning in self.meanings.items():
            value = record.get(column)
            if not is_empty(value) and not meaning.harmless(value):
                self.met[f"{column!r}: {meaning.hint}"] = None
                return f"{column!r} would be lost: {meaning.what}"
        held = "".join(texts) if self.marks else ""
        return next((f"the text holds {mark}, but nothing is read for it" for mark in self.marks if mark in held), "")

    @property
    def hint(self) -> str:
        """What to do about the columns met so far."""
        return "; ".join(self.met)


def rename_hint(columns: Sequence[str], known: Iterable[str]) -> str:
    """What to rename so that columns fit a format: another case, a slip, or another tool's names; `""` if unsure."""
    known = {*known}
    if "instruction" not in columns and {"input", "output"} <= {*columns}:  # alpaca's words, without alpaca
        known -= {"input", "output"}
    by_plain = {plain(name): name for name in known}
    answer = "output" if "instruction" in columns else "completion"
    text = "prompt" if any(plain(column) in _ANSWERS for column in columns) else "text"
    groups = ((_CHATS, "messages"), (_PROMPTS, "prompt"), (_ANSWERS, answer), (_TEXTS, text))
    targets = {str(alias): target for aliases, target in groups for alias in aliases}
    hints, there = [], {*columns}
    for column in (one for one in columns if one not in known):
        name = plain(column)
        target = targets.get(name)
        if target and target not in there:
            hints.append(f"rename {column!r} to {target!r}")
            there.add(target)
        elif meaning := _meaning(name):
            hints.append(f"{column!r}: {meaning.what}; {meaning.hint}")
        elif name in by_plain:
            hints.append(f"{column!r}: did you mean {by_plain[name]!r}?")
        elif not target and (close := nearest(name, known, count=1, cutoff=0.75)):
            hints.append(f"{column!r}: {close}")
    return "; ".join(hints)
