"""Texts of a conversation on their way through a template, so that what a person wrote stays known as such.

A template gets `Held` texts. Each reads as the text itself (length, comparison, strip, split) and prints as a placeholder
that nobody can guess, so that afterwards every character of the output is known to be the template's own or the data's.
What cannot be followed so (`content | reverse`, say) comes out other than without placeholders, and is refused by the
comparison in template.py.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

NOBODY = -1  # the turn of texts that belong to none: tools
_KEY = secrets.token_hex(12)  # of this process: no text that was written before can hold it
BEGIN, END = f"⟦{_KEY}+⟧", f"⟦{_KEY}-⟧"  # round what a template says is generated
MARKS = re.compile(f"⟦{_KEY}(\\d+|\\+|-)⟧")


class Held(str):
    """A text that prints as its placeholder. Names begin with _ so that a template cannot reach what is behind."""

    _real: str
    _turn: int
    _ledger: Ledger

    def __len__(self) -> int:
        return len(self._real)

    def __bool__(self) -> bool:
        return bool(self._real)

    def __contains__(self, part: object) -> bool:
        return bare(part) in self._real

    def __eq__(self, other: object) -> bool:
        return bool(self._real == bare(other))

    def __ne__(self, other: object) -> bool:
        return bool(self._real != bare(other))

    def __hash__(self) -> int:
        return hash(self._real)

    def __getitem__(self, key: Any) -> Any:
        return self._ledger.wrap(self._real[key], self._turn)

    def __iter__(self) -> Any:
        return iter([self._ledger.hold(character, self._turn) for character in self._real])


def _follow(name: str) -> None:
    method = getattr(str, name)

    def call(self: Held, *args: Any, **keys: Any) -> Any:
        return self._ledger.wrap(method(self._real, *map(bare, args), **keys), self._turn)

    setattr(Held, name, call)


for _name in (  # noqa: SIM905
    "capitalize casefold count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper lower "
    "lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines "
    "startswith strip swapcase title upper"
).split():
    _follow(_name)


def bare(value: Any) -> Any:
    """The value with the texts themselves in the place of held ones."""
    if isinstance(value, Held):
        return value._real
    if isinstance(value, Mapping):
        return {bare(key): bare(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bare(item) for item in value)
    return value


def turn_of(value: Any) -> int:
    """The turn that the first held text in `value` belongs to."""
    if isinstance(value, Held):
        return value._turn
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((turn for item in items if (turn := turn_of(item)) != NOBODY), NOBODY)


class Ledger:
    """The placeholders of one conversation: which text and turn each stands for. The same text and turn, the same one."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, int]] = []
        self._known: dict[tuple[str, int], Held] = {}

    def hold(self, text: str, turn: int) -> str:
        """The text, held; nothing needs holding in an empty one."""
        if not text:
            return ""
        held = self._known.get((text, turn))
        if held is None:
            held = Held(f"⟦{_KEY}{len(self.texts)}⟧")
            held._real, held._turn, held._ledger = text, turn, self
            self.texts.append((text, turn))
            self._known[text, turn] = held
        return held

    def wrap(self, value: Any, turn: int) -> Any:
        """The value with every text in it held, keys of mappings too."""
        if isinstance(value, str):
            return self.hold(value, turn)
        if isinstance(value, Mapping):
            return {self.wrap(key, turn): self.wrap(item, turn) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.wrap(item, turn) for item in value)
        return value
