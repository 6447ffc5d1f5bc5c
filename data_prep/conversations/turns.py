"""One turn of a conversation, from the spellings of OpenAI, Hugging Face, ShareGPT and axolotl; and what turns must be.

Nothing is guessed: a role, a type of content or a tool call that is not known refuses the record with a Fault.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from data_prep.conversations.files import Fault, Record
from data_prep.conversations.record import JOINT, Function, Message, Role, ToolCall

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}  # type: ignore[dict-item]
CALLS = ("function_call", "tool_call")  # ShareGPT roles whose value is a call as JSON
FLAGS = ("trained", "train", "weight")
USED = {"role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id", "input_at", *FLAGS}


def as_text(value: object, what: str, notes: Counter[str]) -> str:
    """Text as it is; a number as its digits, which is noted. Raises Fault for everything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        notes["number taken as text"] += 1
        return json.dumps(value)
    raise Fault("text is not a string", f"{what} is {'null' if value is None else 'a ' + type(value).__name__}")


def optional_text(value: object, what: str) -> str | None:
    """Text or nothing; an id may be a number. Raises Fault."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise Fault("text is not a string", f"{what} is a {type(value).__name__}")


def read_turn(turn: object, number: int, notes: Counter[str]) -> Message:
    """A turn of any spelling. Raises Fault, which names it by its number from 1."""
    if not isinstance(turn, dict):
        raise Fault("turn is not an object", f"turn {number} is a {type(turn).__name__}")
    turn = {key: value for key, value in turn.items() if value is not None}  # Parquet fills in what is not there
    where = f"turn {number}"
    speaker = turn.get("role", turn.get("from"))
    if not isinstance(speaker, str):
        raise Fault("turn without a role", f"{where} has " + (", ".join(map(repr, list(turn)[:6])) or "no key"))
    content = turn.get("content", turn.get("value"))
    if speaker.strip().lower() in CALLS:
        return Message("assistant", "", tool_calls=_calls_in_text(content, where), trained=_trained(turn, where))
    role = ROLES.get(speaker.strip().lower())
    if role is None:
        raise Fault("unknown role", f"{where} is by {speaker[:40]!r}; known: {', '.join(ROLES)}")
    calls = _calls(turn, where, notes) if role == "assistant" else ()
    if content is None and (calls or role == "tool"):
        content = ""
    elif isinstance(content, (list, dict)):
        content = _parts(content, where)
    extra = {key: value for key, value in turn.items() if key not in USED}
    if set(extra) == {"extra"} and isinstance(extra["extra"], dict):  # as our own records have it
        extra = extra["extra"]
    message = Message(
        role,
        as_text(content, f"{where}'s content", notes),
        optional_text(turn.get("name"), f"{where}'s name"),
        calls,
        optional_text(turn.get("tool_call_id"), f"{where}'s tool_call_id"),
        _trained(turn, where),
        extra=extra,
    )
    return message if "input_at" not in turn else _with_input(message, turn["input_at"], where)


def _with_input(message: Message, at: object, where: str) -> Message:
    """The message with the begin of its input, checked."""
    if not isinstance(at, int) or isinstance(at, bool) or at < 0 or message.content[:at][-len(JOINT) :] != JOINT:
        raise Fault("input_at does not fit", f"{where}: {at!r} is not where an input begins, behind {JOINT!r}")
    return msgspec.structs.replace(message, input_at=at)


def _parts(content: Any, where: str) -> str:
    """OpenAI's content parts as one text, nothing put between them. Raises Fault for pictures and sound."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Fault(
                "content is not text", f"{where} has a part of type {str(kind)[:40]!r}; only text is trained on"
            )
    return "".join(texts)


def _trained(turn: Record, where: str) -> bool | None:
    said = {bool(turn[key]) for key in FLAGS if key in turn and turn[key] in (0, 1)}
    if len(said) > 1 or any(turn[key] not in (0, 1) for key in FLAGS if key in turn):
        flags = ", ".join(f"{key} {str(turn[key])[:20]}" for key in FLAGS if key in turn)
        raise Fault("weight is neither 0 nor 1", f"{where}: {flags}; a turn is trained or it is not")
    return said.pop() if said else None


def _calls(turn: Record, where: str, notes: Counter[str]) -> tuple[ToolCall, ...]:
    calls = turn.get("tool_calls", [])
    if not isinstance(calls, list):
        raise Fault("broken tool call", f"{where}: tool_calls is a {type(calls).__name__}, not a list")
    if isinstance(legacy := turn.get("function_call"), dict):  # OpenAI's, before there were several
        calls = [*calls, legacy]
    return tuple(_call(call, where, notes) for call in calls)


def _call(call: Any, where: str, notes: Counter[str] | None = None) -> ToolCall:
    """OpenAI's nested call, or a flat {name, arguments}. Arguments keep their spelling where they are text."""
    if isinstance(call, dict) and call.get("type", "function") not in ("function", None):
        raise Fault("broken tool call", f"{where}: a call of type {str(call['type'])[:40]!r}; only functions are known")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        raise Fault("broken tool call", f"{where}: a call without a function's name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif arguments is None or arguments == "":
        arguments = "{}"
    try:
        fits = isinstance(arguments, str) and isinstance(msgspec.json.decode(arguments), dict)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        raise Fault("broken tool call", f"{where}: arguments of {name[:40]!r} are not a JSON object")
    known = {"type", "id", "function", "name", "arguments", "parameters"}
    if notes is not None and any(value is not None for key, value in call.items() if key not in known):
        notes["keys of a tool call left out"] += 1
    return ToolCall(Function(name, arguments), optional_text(call.get("id"), f"{where}: a call's id"))


def _calls_in_text(value: object, where: str) -> tuple[ToolCall, ...]:
    """ShareGPT's function_call turn: one call, or a list of them, as JSON in the text."""
    try:
        calls = msgspec.json.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Fault("broken tool call", f"{where} is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise Fault("broken tool call", f"{where} calls nothing")
    return tuple(_call(call, where) for call in calls)


def check_turns(messages: Sequence[Message], notes: Counter[str]) -> tuple[Message, ...]:
    """The turns that a conversation keeps; what is odd about them is noted, not changed.

    Empty system prompts are dropped. Raises Fault for an empty turn of user or assistant (there is nothing to answer,
    or nothing to learn), and where no turn is the assistant's.
    """
    kept = [message for message in messages if message.role != "system" or message.content.strip()]
    if len(kept) < len(messages):
        notes["empty system prompt dropped"] += 1
    for number, message in enumerate(kept, 1):
        if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls:
            raise Fault(f"empty turn of the {message.role}", f"turn {number} of {len(kept)}")
    roles = [message.role for message in kept]
    if "assistant" not in roles:
        raise Fault("no turn of the assistant", f"turns by {', '.join(dict.fromkeys(roles)) or 'nobody'}")
    talk = [role for role in roles if role != "system"]
    pairs = set(pairwise(talk))
    said = {
        "begins with the assistant": talk[0] == "assistant",
        "two turns of the user in a row": ("user", "user") in pairs,
        "two turns of the assistant in a row": ("assistant", "assistant") in pairs,
        "system prompt behind the first turn": "system" in roles[1:],
        "ends without the assistant": roles[-1] != "assistant",
        "tool answers where none was called": "tool" in roles and not any(m.tool_calls for m in kept),
        "no turn marked for training": not any(m.role == "assistant" and m.trained is not False for m in kept),
    }
    notes.update(name for name, is_so in said.items() if is_so)
    return tuple(kept)
