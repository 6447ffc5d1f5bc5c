"""A conversation as token ids, and which of them are trained; what becomes of one that is too long.

Text between two control tokens of the template is encoded as one, as transformers does, but for one cut: where a trained
turn begins, for there generation begins too. Text never becomes a control token, whoever wrote it: those come from the
template's own pieces by their ids. The data's words are never searched for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_prep.conversations import Conversation
from data_prep.tokenizers import Tokenizer
from llama.chat.template import ChatTemplate, Piece, Refused

TOO_LONG = "too long"
CHUNK = 512  # conversations encoded at once: the tokenizer's threads share them


@dataclass(frozen=True)
class Example:
    """Token ids and a flag for each, whether it is trained; both (n,)."""

    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, begin: int, end: int) -> Example:
        return Example(self.ids[begin:end], self.trained[begin:end])


class Encoder:
    """Conversations to examples of at most `limit` tokens.

    Args:
        loss: train all of the assistant's turns, or the last; a turn that says so itself (`trained`) has its way.
        truncation: error; drop; split at a turn; left: of the prompt, what is before the first trained token.
        limit: most tokens of an example.
    `counts` tells what was refused, dropped, split, cut; `places` the first place of each.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, loss: str, truncation: str, limit: int):
        self.tokenizer, self.template = tokenizer, template
        self.loss, self.truncation, self.limit = loss, truncation, limit
        self.counts: Counter[str] = Counter()
        self.places: dict[str, str] = {}
        self.longest = 0  # tokens of the longest that is too long
        joint = tokenizer.encode("\n")
        # SentencePiece begins a text with a space of its own, which a text that goes on from another must not have.
        self._joint = joint if tokenizer.encode("\na")[len(joint) :] != tokenizer.encode("a") else None

    def turns(self, conversation: Conversation) -> Callable[[int], bool]:
        """Which of the assistant's turns are trained."""
        messages = conversation.messages
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)

        def trained(turn: int) -> bool:
            said = messages[turn].trained
            return messages[turn].role == "assistant" and (
                said if said is not None else self.loss == "all" or turn == last
            )

        return trained

    def whole(self, conversations: Sequence[Conversation]) -> list[Example | None]:
        """Each conversation in all its length; None, and counted, where the template refuses it."""
        rendered: list[list[Piece] | None] = []
        for conversation in conversations:
            try:
                rendered.append(self.template.pieces(conversation, self.turns(conversation)))
            except Refused as why:
                self._note(f"refused: {why}", conversation)
                rendered.append(None)
        plans = [None if pieces is None else _stretches(pieces) for pieces in rendered]
        texts = [
            text
            for plan in plans
            for text, control, _, goes_on in plan or ()
            if not control and not (goes_on and self._joint)
        ]
        ids, lengths = self.tokenizer.encode_flat(texts) if texts else (np.empty(0, np.uint32), np.empty(0, np.int64))
        ends = np.cumsum(lengths)
        done = 0
        out: list[Example | None] = []
        for plan in plans:
            if plan is None:
                out.append(None)
                continue
            parts, flags = [np.empty(0, np.uint32)], [np.empty(0, bool)]
            for text, control, trained, goes_on in plan:
                if control:
                    part = np.array([self.template.control[text]], np.uint32)
                elif goes_on and self._joint:
                    part = np.array(self._continued(text), np.uint32)
                else:
                    part = ids[ends[done] - lengths[done] : ends[done]]
                    done += 1
                parts.append(part)
                flags.append(np.full(len(part), trained))
            out.append(Example(np.concatenate(parts), np.concatenate(flags)))
        return out

    def _continued(self, text: str) -> list[int]:
        joint = self._joint or []
        ids = self.tokenizer.encode("\n" + text)
        return ids[len(joint) :] if ids[: len(joint)] == joint else self.tokenizer.encode(text)

    def examples(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Example]]]:
        """Each conversation with the examples that it gives: one, none, or several where it is split."""
        for chunk in _chunks(conversations, CHUNK):
            for conversation, example in zip(chunk, self.whole(chunk), strict=True):
                yield conversation, [] if example is None else list(self._fit(conversation, example))

    def _fit(self, conversation: Conversation, example: Example) -> Iterator[Example]:
        end = int(np.flatnonzero(example.trained[1:])[-1]) + 2 if example.trained[1:].any() else 0
        if not end:
            return self._note("nothing trained", conversation)
        bos = self.tokenizer.bos
        if bos is not None and len(example) > 1 and example.ids[0] == example.ids[1] == bos:
            self._note("double BOS", conversation)
        example = example.cut(0, end)  # what follows the last trained token teaches nothing
        if len(example) <= self.limit:
            yield example
        elif self.truncation == "error":
            self._note(TOO_LONG, conversation)
            self.longest = max(self.longest, len(example))
        elif self.truncation == "split":
            yield from self._split(conversation)
        elif self.truncation == "left":
            yield from self._left(conversation, example)
        else:
            self._note("too long, dropped", conversation)

    def _left(self, conversation: Conversation, example: Example) -> Iterator[Example]:
        """Without tokens of the prompt: those after BOS, and a prompt of one token is left."""
        begin = int(len(example) > 0 and example.ids[0] == self.tokenizer.bos)
        surplus, first = len(example) - self.limit, int(np.argmax(example.trained))
        if begin + surplus >= first:
            return self._note("too long even without its prompt, dropped", conversation)
        self._note("prompt cut on the left", conversation)
        kept = np.r_[0:begin, begin + surplus : len(example)]
        yield Example(example.ids[kept], example.trained[kept])

    def _split(self, conversation: Conversation) -> Iterator[Example]:
        """In parts that begin with a turn of the user, each with the system prompt; as many rounds in each as fit."""
        trained = self.turns(conversation)  # of the whole: the last turn of a part is not the last of all
        system = tuple(m for m in conversation.messages if m.role == "system")
        turns = [
            msgspec.structs.replace(m, trained=trained(i)) if m.role == "assistant" else m
            for i, m in enumerate(conversation.messages)
        ]
        rounds: list[list[object]] = []
        for message in turns:
            if message.role == "system":
                continue
            if not rounds or (message.role == "user" and rounds[-1][-1].role != "user"):  # type: ignore[attr-defined]
                rounds.append([])
            rounds[-1].append(message)
        first, parts = 0, 0
        while first < len(rounds):
            best: Example | None = None
            stop = first
            for last in range(first + 1, len(rounds) + 1):
                messages = (*system, *(m for group in rounds[first:last] for m in group))
                part = self.whole([msgspec.structs.replace(conversation, messages=messages)])[0]
                if part is None:
                    break
                found = np.flatnonzero(part.trained[1:])
                part = part.cut(0, int(found[-1]) + 2 if len(found) else 0)
                if len(part) > self.limit:
                    break
                best, stop = part, last
            if best is None:
                self._note("a round too long, dropped", conversation)
            elif len(best):
                parts += 1
                yield best
            first = max(stop, first + 1)
        if parts > 1:
            self._note("split", conversation)

    def _note(self, what: str, conversation: Conversation) -> None:
        self.counts[what] += 1
        self.places.setdefault(what, str(conversation.source))


def _stretches(pieces: Sequence[Piece]) -> list[tuple[str, bool, bool, bool]]:
    """(text, control token, trained, goes on from a text): pieces of one kind joined."""
    out = []
    before_text = False
    for (control, trained), group in groupby(pieces, key=lambda piece: (piece.control, piece.trained)):
        if control:
            out += [(piece.text, True, trained, False) for piece in group]
        elif text := "".join(piece.text for piece in group):
            out.append((text, False, trained, before_text))
        before_text = not control
    return out


def _chunks(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    chunk: list[Conversation] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
