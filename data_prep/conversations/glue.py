"""GLUE's classification tasks as conversations: a question in words, and the label as the word that answers it.

Columns, labels and their numbers: gluebenchmark.com's files, and the same tasks as Hugging Face numbers them. A record
keeps its label under `extra["label"]` and the task's name under `extra["task"]`, so that answers can be judged later:
`TASKS[name].words` are the answers there are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.conversations.files import Fault, Record
from data_prep.conversations.record import Message

LABELS = ("label", "gold_label", "Quality", "is_duplicate")
NUMBERS = ("index", "idx", "pairID")
ALIKE = {"#1 String": "sentence1", "#2 String": "sentence2", "premise": "sentence1", "hypothesis": "sentence2"}


@dataclass(frozen=True)
class Task:
    """What a task asks. `prompt` names its columns; `answers`: label as the file spells it -> word."""

    name: str
    columns: tuple[str, ...]
    prompt: str
    answers: dict[str, str]

    @property
    def words(self) -> tuple[str, ...]:
        """The answers there are, each once."""
        return tuple(dict.fromkeys(self.answers.values()))

    def fits(self, record: Record) -> bool:
        """Whether the record has this task's columns, and a label that could be its own (or none that is known)."""
        names = {ALIKE.get(name, name) for name in record}
        return {*self.columns} <= names and (label_of(record) or "-1") in {*self.answers, "-1", "-"}

    def convert(self, record: Record) -> tuple[list[Message], set[str], dict[str, str]]:
        """Turns, the keys they came from, and what is to be remembered. Raises Fault."""
        cells = {ALIKE.get(name, name): (name, value) for name, value in record.items()}
        if missing := [name for name in self.columns if name not in cells]:
            raise Fault(f"no {missing[0]!r}", f"has {', '.join(map(repr, list(record)[:8]))}")
        label = label_of(record)
        if label is None:
            raise Fault("no label", "the test split of a benchmark has none to train on")
        if label not in self.answers:
            raise Fault("unknown label", f"{label[:40]!r}; {self.name} has {', '.join(self.answers)}")
        texts = {name: cells[name][1] for name in self.columns}
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise Fault("empty text", f"column {name!r}")
        used = {cells[name][0] for name in self.columns}
        turns = [Message("user", self.prompt.format(**texts)), Message("assistant", self.answers[label])]
        return turns, used, {"task": self.name, "label": label}


def label_of(record: Record) -> str | None:
    """The label as text; None where there is none, which Hugging Face writes as -1 and MNLI as "-"."""
    value = next((record[name] for name in LABELS if record.get(name) is not None), None)
    label = str(int(value)) if isinstance(value, (bool, int)) else value
    return label if isinstance(label, str) and label not in ("-1", "-", "") else None


def _answers(words: dict[str, str], order: tuple[str, ...]) -> dict[str, str]:
    """Labels by name, and by the number that is their place in `order`."""
    return words | {str(number): words[name] for number, name in enumerate(order)}


_ENTAILS = _answers({"entailment": "yes", "not_entailment": "no"}, ("entailment", "not_entailment"))
_SAME = {"0": "no", "1": "yes", "not_equivalent": "no", "equivalent": "yes"}
TASKS = {
    task.name: task
    for task in (
        Task(
            "qnli",
            ("question", "sentence"),
            "Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question? Answer yes or no.",
            _ENTAILS,
        ),
        Task(
            "rte",
            ("sentence1", "sentence2"),
            "Text: {sentence1}\nClaim: {sentence2}\nDoes the claim follow from the text? Answer yes or no.",
            _ENTAILS,
        ),
        Task(
            "wnli",
            ("sentence1", "sentence2"),
            "Text: {sentence1}\nClaim: {sentence2}\nIs the claim true if the text is? Answer yes or no.",
            {"0": "no", "1": "yes", "not_entailment": "no", "entailment": "yes"},
        ),
        Task(
            "mrpc",
            ("sentence1", "sentence2"),
            "First sentence: {sentence1}\nSecond sentence: {sentence2}\n"
            "Do the two sentences mean the same? Answer yes or no.",
            _SAME,
        ),
        Task(
            "qqp",
            ("question1", "question2"),
            "First question: {question1}\nSecond question: {question2}\n"
            "Do the two questions ask the same? Answer yes or no.",
            _SAME | {"not_duplicate": "no", "duplicate": "yes"},
        ),
        Task(
            "mnli",
            ("sentence1", "sentence2"),
            "Text: {sentence1}\nClaim: {sentence2}\n"
            "Does the claim follow from the text? Answer yes, no (the text says otherwise) or maybe.",
            _answers(
                {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
                ("entailment", "neutral", "contradiction"),
            ),
        ),
        Task(
            "sst2",
            ("sentence",),
            "Review: {sentence}\nIs the review positive or negative?",
            _answers({"negative": "negative", "positive": "positive"}, ("negative", "positive")),
        ),
        Task(
            "cola",
            ("sentence",),
            "Sentence: {sentence}\nIs the sentence grammatical? Answer yes or no.",
            _answers({"unacceptable": "no", "acceptable": "yes"}, ("unacceptable", "acceptable")),
        ),
    )
}
# Columns that other tasks lack tell tasks apart whose other columns are the same.
_TELLING = {"gold_label": "mnli", "premise": "mnli", "Quality": "mrpc", "#1 String": "mrpc", "star": "cola"}


def tasks_of(record: Record, path: Path) -> list[str]:
    """The tasks that a record may be of: by its columns, then its label, then the names of file and folder."""
    if "sentence1" in record and any(name in record for name in ("score", "similarity_score")):
        return []  # STS-B has degrees, not classes
    found = [task.name for task in TASKS.values() if task.fits(record)]
    if "qnli" in found:
        return ["qnli"]  # its sentence is not SST-2's
    told = [name for column, name in _TELLING.items() if column in record and name in found]
    if told:
        return told[:1]
    if len(found) > 1 and label_of(record) in ("entailment", "not_entailment"):
        found = [name for name in found if name == "rte"] or found
    elif len(found) > 1 and label_of(record) in ("neutral", "contradiction"):
        found = ["mnli"]
    words = set(re.split(r"[^a-z0-9]+", f"{path.parent.name}/{path.name}".lower().replace("sst-2", "sst2")))
    return [name for name in found if name in words] or found
