"""The formats of instruction data: how each is told from a record's keys, and what turns it becomes.

Alpaca: instruction, output (or response), perhaps input (or context), system, history. Prompt: one key of PROMPTS and
one of ANSWERS. ShareGPT: conversations of {from, value}. Messages: OpenAI's, and what we write ourselves. GLUE's tasks:
see glue.py. Keys that no turn comes from are kept in `extra`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from data_prep.conversations import glue
from data_prep.conversations.files import Fault, Record
from data_prep.conversations.record import JOINT, Conversation, Location, Message, located
from data_prep.conversations.turns import as_text, check_turns, optional_text, read_turn

PROMPTS = ("prompt", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
CONTEXTS = ("context", "passage", "document", "choices", "options")  # beside a question they belong into the prompt
SYSTEMS = ("system", "system_prompt")
OWN = {"messages", "source", "id", "tools", "extra"}
KNOWN = (
    "messages (a list of role, content), conversations (a list of from, value), instruction + output, "
    "prompt + completion (or question + answer, …), and the columns of GLUE's tasks"
)


@dataclass
class Draft:
    """Turns of a record, the keys that they came from, and what else is to be kept."""

    turns: list[Message]
    used: set[str]
    extra: Record = field(default_factory=dict)


def _one(record: Record, names: tuple[str, ...]) -> str | None:
    """The key of `names` that the record has; None when it has none, or several."""
    found = [name for name in names if name in record]
    return found[0] if len(found) == 1 else None


def _turns_key(record: Record, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(record.get(name), list)), None)


def _needed(record: Record, names: tuple[str, ...]) -> str:
    """The one key of `names` that the record has. Raises Fault."""
    if (name := _one(record, names)) is not None:
        return name
    both = [name for name in names if name in record]
    if both:
        raise Fault(f"both {both[0]!r} and {both[1]!r}", "one of them must go")
    there = ", ".join(map(repr, list(record)[:8])) or "no key"
    raise Fault(f"no {' or '.join(map(repr, names[:2]))}", f"has {there}")


def _alpaca(record: Record, notes: Counter[str]) -> Draft:
    answer = _needed(record, ("output", "response"))
    if "instruction" not in record:
        raise Fault("no 'instruction'", "has " + ", ".join(map(repr, list(record)[:8])))
    instruction = as_text(record["instruction"], "instruction", notes)
    key = _one(record, ("input", "context"))
    given = as_text(record[key], key, notes) if key else ""
    both = bool(instruction.strip() and given.strip())
    prompt = Message(
        "user",
        f"{instruction}{JOINT}{given}" if both else given if given.strip() else instruction,
        input_at=len(instruction) + len(JOINT) if both else None,
    )
    turns = [prompt, Message("assistant", as_text(record[answer], answer, notes))]
    return Draft(_history(record, notes) + turns, {"instruction", answer, "history", *([key] if key else [])})


def _prompt(record: Record, notes: Counter[str]) -> Draft:
    question, answer = _needed(record, PROMPTS), _needed(record, ANSWERS)
    used = {question, answer, "history"}
    if isinstance(record[question], list) and isinstance(record[answer], list):  # TRL's conversational form
        turns = [read_turn(turn, i, notes) for i, turn in enumerate([*record[question], *record[answer]], 1)]
        return Draft(turns, used)
    turns = [
        Message("user", as_text(record[question], question, notes)),
        Message("assistant", as_text(record[answer], answer, notes)),
    ]
    return Draft(_history(record, notes) + turns, used)


def _history(record: Record, notes: Counter[str]) -> list[Message]:
    """Earlier rounds, as [[user, assistant], …]."""
    rounds = record.get("history") or []
    if not isinstance(rounds, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in rounds):
        raise Fault("broken history", "it must be a list of pairs, user and assistant")
    turns = []
    for number, (question, answer) in enumerate(rounds, 1):
        turns.append(Message("user", as_text(question, f"history, round {number}", notes)))
        turns.append(Message("assistant", as_text(answer, f"history, round {number}", notes)))
    return turns


def _of_turns(*names: str) -> Callable[[Record, Counter[str]], Draft]:
    def convert(record: Record, notes: Counter[str]) -> Draft:
        key = _turns_key(record, names)
        if key is None:
            there = ", ".join(map(repr, list(record)[:8])) or "no key"
            raise Fault(f"no list {names[0]!r}", f"has {there}")
        return Draft([read_turn(turn, number, notes) for number, turn in enumerate(record[key], 1)], {key})

    return convert


def _of_task(task: glue.Task) -> Callable[[Record, Counter[str]], Draft]:
    def convert(record: Record, notes: Counter[str]) -> Draft:
        turns, used, extra = task.convert(record)
        return Draft(turns, used | {name for name in glue.LABELS if name in record}, extra)

    return convert


FORMATS: dict[str, Callable[[Record, Counter[str]], Draft]] = {
    "messages": _of_turns("messages"),
    "sharegpt": _of_turns("conversations", "conversation"),
    "alpaca": _alpaca,
    "prompt": _prompt,
    **{name: _of_task(task) for name, task in glue.TASKS.items()},
}


def recognize(record: Record, path: Path) -> list[str]:
    """The formats that a record may be of: one where it is clear, none where it is unknown."""
    record = {key: value for key, value in record.items() if value is not None}
    turns = [
        name
        for name, keys in (("messages", ("messages",)), ("sharegpt", ("conversations", "conversation")))
        if _turns_key(record, keys)
    ]
    if turns:
        return turns
    if "instruction" in record:
        return ["alpaca"] if _one(record, ("output", "response")) else []
    if _one(record, PROMPTS) and _one(record, ANSWERS):
        return [] if any(name in record for name in CONTEXTS) else ["prompt"]
    return glue.tasks_of(record, path)


def convert(record: Record, kind: str, place: Location, notes: Counter[str]) -> Conversation:
    """The conversation that a record of format `kind` holds. Raises Fault; `notes` counts what is odd but kept."""
    record = {key: value for key, value in record.items() if value is not None}
    draft = FORMATS[kind](record, notes)
    used, extra = draft.used, {}
    source = located(record.get("source")) if kind == "messages" and set(record) <= OWN else None
    if source is not None:
        used |= {"source", "extra"}
        extra = record.get("extra", {})
        if not isinstance(extra, dict):
            raise Fault("extra is not an object", f"a {type(extra).__name__}")
    system = next((name for name in SYSTEMS if name in record), None)
    if system is not None:
        used.add(system)
        _put_system(draft.turns, as_text(record[system], system, notes))
    name = "id" if "id" in record else next((n for n in glue.NUMBERS if kind in glue.TASKS and n in record), None)
    number = optional_text(record[name], name) if name else None
    tools = _tools(record, used)
    used |= {name} if name else set()
    extra = extra | {key: value for key, value in record.items() if key not in used} | draft.extra
    return Conversation(check_turns(draft.turns, notes), source or place, number, tools, extra)


def _put_system(turns: list[Message], text: str) -> None:
    """Put a record's system prompt first. Raises Fault where the turns begin with another one."""
    if not text.strip():
        return
    if not turns or turns[0].role != "system":
        turns.insert(0, Message("system", text))
    elif turns[0].content != text:
        raise Fault("two system prompts", "one beside the turns and another in the first of them")


def _tools(record: Record, used: set[str]) -> tuple[dict[str, Any], ...]:
    """The tools of a record: a list, or a list written as JSON in a text; OpenAI's older `functions` wrapped."""
    name = _one(record, ("tools", "functions"))
    if name is None:
        return ()
    used.add(name)
    tools = record[name]
    if isinstance(tools, str):
        try:
            tools = msgspec.json.decode(tools) if tools.strip() else []
        except (ValueError, RecursionError):
            raise Fault("broken tools", f"{name} is a text that is not JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Fault("broken tools", f"{name} must be a list of objects")
    return tuple(tools if name == "tools" else ({"type": "function", "function": tool} for tool in tools))
