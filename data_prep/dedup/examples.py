"""examples.md: some removed documents beside the ones that stay, so that a person can judge the threshold."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

import numpy as np

from data_prep.dedup import lines
from data_prep.dedup.candidates import Catalogue
from data_prep.dedup.plan import Plan
from data_prep.dedup.store import replacing

if TYPE_CHECKING:
    from data_prep.dedup.write import Decisions

SHOWN_TOKENS = 3000  # of each difference; difflib is quadratic in the worst case
CONTEXT, LONGEST = 12, 80  # tokens of agreement shown at either end, and of one side of a difference
# Words with the space behind them, or single characters where no space is
_TOKEN = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff]|[^\s]+?(?=[\u3005-\u9fff])|\S+"
)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~])")


def choose(decided: Decisions, count: int) -> list[int]:
    """Which of the removed to show: the least similar, and one of each of the largest clusters."""
    near = np.flatnonzero(~decided.copy)
    if not len(near):
        return []
    closest = near[np.lexsort((near, decided.jaccard[near]))][: count - count // 2].tolist()
    kept, index, counts = np.unique(decided.kept[near], return_index=True, return_counts=True)
    largest = near[index[np.lexsort((kept, -counts))]].tolist()
    chosen = dict.fromkeys(closest)
    for one in largest:
        if len(chosen) >= count:
            break
        chosen[one] = None
    return list(chosen)


def write_examples(plan: Plan, known: Catalogue, decided: Decisions) -> None:
    """Write DIR/examples.md."""
    chosen = choose(decided, plan.settings.examples)
    texts = _texts(plan, known, decided, {int(d) for at in chosen for d in (decided.kept[at], decided.removed[at])})
    out = ["# Near duplicates: what went, beside what stays", ""]
    if not chosen:
        out += ["None were found."]
    for at in chosen:
        kept, removed = int(decided.kept[at]), int(decided.removed[at])
        cluster = int(np.count_nonzero(decided.kept == kept))
        out += [f"## Jaccard {decided.jaccard[at]:.3f}; {cluster:,} went for this one", ""]
        names = []
        for document in (kept, removed):
            number, line = known.place(np.array([document]), decided.line[[document]])
            names.append(_plain(f"{plan.files[int(number[0])].path}:{int(line[0])}"))
        out += [f"| stays: {names[0]} | went: {names[1]} |", "|---|---|"]
        out += [f"| {left} | {right} |" for left, right in _rows(texts[kept], texts[removed])]
        out += [""]
    with replacing(plan.output / "examples.md") as file:
        file.write(("\n".join(out).rstrip("\n") + "\n").encode("utf-8", "replace"))


def _texts(plan: Plan, known: Catalogue, decided: Decisions, documents: set[int]) -> dict[int, str]:
    """The texts of a few documents, read from their pieces of the input."""
    found: dict[int, str] = {}
    pieces = [piece for task in plan.tasks for piece in task]
    wanted: dict[int, dict[int, int]] = {}
    for document in sorted(documents):
        number = int(np.searchsorted(known.piece_first, document, side="right")) - 1
        wanted.setdefault(number, {})[int(decided.line[document])] = document
    for number, of_line in wanted.items():
        piece, last = pieces[number], max(of_line)
        path = plan.files[piece.file].path
        key = lines.find_key(path, plan.settings.key)
        for block in lines.read_blocks(path, piece.start, piece.end):
            here = [line for line in of_line if block.line <= line < block.line + block.count]
            data = lines.split(block.data) if here else []
            found |= {of_line[line]: lines.read_text(data[line - block.line], key) for line in here}
            if block.line + block.count > last:
                break
    return found


def _plain(text: str) -> str:
    """Text that a Markdown table shows as it is; control characters are left out."""
    return _MARKUP.sub(r"\\\1", "".join(c if c.isprintable() else " " for c in text))


def _rows(kept: str, removed: str) -> list[tuple[str, str]]:
    """Differences side by side in bold, with the words around them; what agrees is cut short."""
    a, b = _TOKEN.findall(kept), _TOKEN.findall(removed)
    head = _agreeing(a, b)
    tail = _agreeing(a[head:][::-1], b[head:][::-1])
    rows = [_same(a[:head])]
    a_end, b_end = a[len(a) - tail :], b[len(b) - tail :]
    a, b = a[head : len(a) - tail], b[head : len(b) - tail]
    cut = len(a) > SHOWN_TOKENS or len(b) > SHOWN_TOKENS
    a, b = a[:SHOWN_TOKENS], b[:SHOWN_TOKENS]
    for kind, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        rows.append(_same(a[a1:a2]) if kind == "equal" else (_bold(a[a1:a2]), _bold(b[b1:b2])))
    rows += [("… cut here …", "… cut here …")] if cut else [_same(a_end)] if b_end else []
    return [row for row in rows if any(row)]


def _agreeing(a: list[str], b: list[str]) -> int:
    """How many tokens agree from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _same(tokens: list[str]) -> tuple[str, str]:
    if len(tokens) > 2 * CONTEXT + 5:
        tokens = [*tokens[:CONTEXT], f"… {len(tokens) - 2 * CONTEXT} equal …", *tokens[-CONTEXT:]]
    text = _plain(" ".join(tokens))
    return text, text


def _bold(tokens: list[str]) -> str:
    more = f" … {len(tokens) - LONGEST} more …" if len(tokens) > LONGEST else ""
    return f"**{_plain(' '.join(tokens[:LONGEST]))}**{more}" if tokens else ""
