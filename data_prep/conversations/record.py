"""The one record that instruction data becomes, whatever format it came in: typed, frozen, with its place of origin.

Written as JSON it is the `messages` format of OpenAI and Hugging Face, one conversation a line, so other tools read it
too; what they have no name for stands beside it (`source`, `extra`, `trained`, `input_at`). Reading it back gives an
equal record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
JOINT = "\n\n"  # between an Alpaca record's instruction and its input


class Location(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a record came from. Lines and records count from 1."""

    file: str
    line: int | None = None
    """Line on which the record begins; None in Parquet."""
    record: int | None = None
    """Number of the record; None where each line is one (JSON Lines, TSV)."""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return place if self.record is None else f"{place} (record {self.record:,})"


class Function(msgspec.Struct, frozen=True):
    """The function that a tool call names."""

    name: str
    arguments: str
    """A JSON object, as the text that the model writes."""


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="function"):
    """A call by the assistant, in OpenAI's shape."""

    function: Function
    id: str | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn. Text is the source's, character for character: nothing stripped, no template applied."""

    role: Role
    content: str
    """Empty only for an assistant that calls tools and says nothing, and for a tool that returned nothing."""
    name: str | None = None
    """Who speaks, where the source names it; for a tool the function's name."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's answer: the call that it answers."""
    trained: bool | None = None
    """Whether the source wants this turn trained (OpenAI's `weight`, axolotl's `train`); None: it does not say."""
    input_at: int | None = None
    """Where the input of an Alpaca record begins in `content`, which is instruction, JOINT, input."""
    extra: dict[str, Any] = {}
    """Keys that this record has no name for, unchanged."""

    @property
    def instruction_and_input(self) -> tuple[str, str]:
        """The two parts of an Alpaca prompt, for templates that keep them apart; the second is empty elsewhere."""
        if self.input_at is None:
            return self.content, ""
        return self.content[: self.input_at].removesuffix(JOINT), self.content[self.input_at :]


class Conversation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Turns in their order, at least one of them the assistant's."""

    messages: tuple[Message, ...]
    source: Location
    id: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the assistant may call, as JSON schemas, unchanged."""
    extra: dict[str, Any] = {}
    """Keys of the source that no turn came from (category, score, label, …), unchanged; null ones are left out."""


def encode(conversation: Conversation) -> bytes:
    """One line of JSON without its newline."""
    return msgspec.json.encode(conversation)


def located(value: object) -> Location | None:
    """The `source` of a record that `encode` wrote; None for anything else under that key."""
    if not isinstance(value, Mapping):
        return None
    try:
        return msgspec.convert(value, Location) if set(value) <= {"file", "line", "record"} else None
    except msgspec.ValidationError:
        return None
