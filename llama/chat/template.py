"""A chat template over a conversation: its text in pieces, each the template's own or the data's, trained or not.

Templates are Jinja in Hugging Face's dialect (transformers, utils/chat_template_utils.py) and run in jinja2's sandbox.
Contents pass through as placeholders (held.py), so which characters a person wrote is never guessed from the text. A
template that treats contents in a way that cannot be followed is refused with the place of the difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec

from data_prep.conversations import Conversation
from data_prep.errors import UserError
from llama.chat.held import BEGIN, END, MARKS, NOBODY, Ledger, bare, turn_of


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered text. `control`: a control token of the template; text of the data never is one."""

    text: str
    control: bool
    trained: bool


class Refused(Exception):  # noqa: N818 (a verdict, not a fault of ours)
    """A conversation that the template does not take; the message says why."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}: what the model writes, between the ledger's marks while a text is traced."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        ledger = self.environment.ledger  # type: ignore[attr-defined]
        return caller() if ledger is None else f"{BEGIN}{caller()}{END}"


class ChatTemplate:
    """A template with the control tokens of its tokenizer.

    Args:
        name: for messages.
        source: Jinja.
        control: what is a control token where the template itself writes it.
        names: what the template knows beside messages: bos_token, eos_token, …
    Raises UserError for Jinja that cannot be compiled.
    """

    def __init__(self, name: str, source: str, control: Mapping[str, int], names: Mapping[str, str]):
        self.name, self.source, self.names = name, source, dict(names)
        self.control = dict(control)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = self._tojson
        environment.globals["raise_exception"] = _raise
        environment.ledger = None  # type: ignore[attr-defined]
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"chat template of {name}: not valid Jinja: {error}; repair it, or set chat.template"
            ) from None
        self._environment: Any = environment

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself says what the model writes."""
        return re.search(r"{%-?\s*generation\b", self.source) is not None

    def pieces(self, conversation: Conversation, trained: Callable[[int], bool]) -> list[Piece]:
        """The conversation's text. `trained`: whether the turn of a number is; asked for the assistant's alone.

        A turn is what its content prints, with what the template puts behind up to the first control token: the end of
        turn. Raises Refused where the template does, or where what it does to a content cannot be followed.
        """
        ledger = Ledger()
        messages, tools = _arguments(conversation, ledger)
        text = self._render(messages, tools, ledger)
        marks = list(MARKS.finditer(text))
        self._check(MARKS.sub(lambda m: _real(ledger, m), text), messages, tools)
        spans = self._generated(ledger, marks) if self.marks_generation else self._turns(
            conversation, ledger, text, marks, messages, tools
        )  # fmt: skip
        spans = [span for span in spans if trained(span[2])]
        return self._cut(ledger, text, marks, spans)

    def _render(self, messages: Any, tools: Any, ledger: Ledger | None, prompt: bool = False) -> str:
        self._environment.ledger = ledger
        try:
            return str(
                self._template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **self.names)
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            OverflowError,
        ) as error:
            raise Refused(f"the chat template of {self.name} refuses it: {error}") from None

    def _check(self, traced: str, messages: Any, tools: Any) -> None:
        """The text with contents put in afterwards is the text that the template makes of them directly."""
        direct = self._render(bare(messages), bare(tools), None)
        if direct != traced:
            at = next((i for i, (a, b) in enumerate(zip(direct, traced, strict=False)) if a != b), len(traced))
            raise Refused(
                f"the chat template of {self.name} changes contents in a way that cannot be followed (at "
                f"{direct[max(0, at - 20) : at + 20]!r}), so that user text and control tokens could not be told apart"
            )

    def _generated(self, ledger: Ledger, marks: list[re.Match[str]]) -> list[tuple[int, int, int]]:
        """(begin, end, turn) of what the template marks as generated."""
        spans, begin, turn = [], 0, NOBODY
        for mark in marks:
            if mark[0] == BEGIN:
                begin, turn = mark.end(), NOBODY
            elif mark[0] == END:
                if turn != NOBODY:
                    spans.append((begin, mark.start(), turn))
            elif turn == NOBODY:
                turn = ledger.texts[int(mark[1])][1]
        return spans

    def _turns(
        self,
        conversation: Conversation,
        ledger: Ledger,
        text: str,
        marks: list[re.Match[str]],
        messages: Any,
        tools: Any,
    ) -> list[tuple[int, int, int]]:
        """(begin, end, turn) of the assistant's turns."""
        printed: dict[int, list[re.Match[str]]] = {}
        previous = NOBODY
        for mark in marks:
            turn = ledger.texts[int(mark[1])][1]
            if turn not in (previous, NOBODY) and turn in printed and conversation.messages[turn].role == "assistant":
                raise Refused(f"the chat template of {self.name} prints turn {turn + 1} in two places")
            printed.setdefault(turn, []).append(mark)
            previous = turn
        spans = []
        for turn, message in enumerate(conversation.messages):
            if message.role != "assistant" or turn not in printed:
                continue
            begin, behind = printed[turn][0].start(), printed[turn][-1].end()
            if message.tool_calls:  # what the model writes before the first argument is the template's text
                prompt = self._prompt(messages[:turn], tools, ledger)
                begin = len(prompt) if prompt and text.startswith(prompt) else begin
            following = MARKS.search(text, behind)
            end = self._pattern.search(text, behind, following.start() if following else len(text))
            spans.append((begin, end.end() if end else behind, turn))
        return spans

    def _prompt(self, messages: Any, tools: Any, ledger: Ledger) -> str:
        try:
            return self._render(messages, tools, ledger, prompt=True)
        except Refused:
            return ""

    def _cut(
        self, ledger: Ledger, text: str, marks: list[re.Match[str]], spans: list[tuple[int, int, int]]
    ) -> list[Piece]:
        """Pieces from the text with placeholders: cut at spans, contents whole, the template's control tokens apart."""
        edges = sorted({edge for begin, end, _ in spans for edge in (begin, end)})
        pieces: list[Piece] = []

        def inside(at: int) -> bool:
            return any(begin <= at < end for begin, end, _ in spans)

        def own(begin: int, end: int) -> None:
            cuts = [begin, *(edge for edge in edges if begin < edge < end), end]
            for first, last in pairwise(cuts):
                for i, part in enumerate(self._pattern.split(text[first:last])):
                    if part:
                        pieces.append(Piece(part, i % 2 == 1, inside(first)))

        at = 0
        for mark in marks:
            own(at, mark.start())
            if mark[0] not in (BEGIN, END):
                pieces.append(Piece(_real(ledger, mark), False, inside(mark.start())))
            at = mark.end()
        own(at, len(text))
        return pieces

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent: int | None = None, **keys: Any) -> str:
        """transformers' tojson; what comes of held texts is held itself."""
        written = json.dumps(bare(value), ensure_ascii=ensure_ascii, indent=indent, **keys)
        ledger = self._environment.ledger
        return written if ledger is None else ledger.hold(written, turn_of(value))


def _real(ledger: Ledger, mark: re.Match[str]) -> str:
    return ledger.texts[int(mark[1])][0] if mark[1].isdigit() else ""


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(bare(message)))


def _arguments(conversation: Conversation, ledger: Ledger) -> tuple[list[dict[str, Any]], Any]:
    """messages and tools as templates expect them, every text of the data held."""
    messages = []
    for turn, message in enumerate(conversation.messages):
        instruction, given = message.instruction_and_input
        keys: dict[str, Any] = {"content": message.content, "instruction": instruction, "input": given}
        keys |= {"name": message.name} if message.name is not None else {}
        keys |= {"tool_call_id": message.tool_call_id} if message.tool_call_id is not None else {}
        if message.tool_calls:
            keys["tool_calls"] = [
                {"function": {"name": c.function.name, "arguments": msgspec.json.decode(c.function.arguments)}}
                | ({"id": c.id} if c.id is not None else {})
                for c in message.tool_calls
            ]
        held = {key: ledger.wrap(value, turn) for key, value in keys.items()}
        for call in held.get("tool_calls", ()):
            call["type"] = "function"
        messages.append({"role": message.role} | held)
    return messages, ledger.wrap(list(conversation.tools), NOBODY) or None
