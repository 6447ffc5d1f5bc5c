"""Instruction data: every format becomes the same record, what is odd is stated, what is not understood is placed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.conversations import Conversation, Location, Message, Tally, read_conversations, write_conversations
from data_prep.conversations.glue import TASKS
from data_prep.errors import UserError

FIXTURES = Path(__file__).parents[2] / "fixtures"


def read(path: Path, **options: Any) -> list[Conversation]:
    return list(read_conversations([path], **options))


def one(tmp_path: Path, record: object, **options: Any) -> Conversation:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    (conversation,) = read(path, **options)
    return conversation


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


ASKED = [("user", "Hi"), ("assistant", "Hello.")]
FORMATS: dict[str, tuple[str, object, list[tuple[str, str]]]] = {
    "messages": ("messages", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}, ASKED),
    "content_parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                      {"role": "assistant", "content": "Hello."}]},
        ASKED,
    ),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, ASKED),
    "sharegpt_with_system": (
        "sharegpt",
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        [("system", "Be kind."), *ASKED],
    ),
    "roles_in_conversation": (
        "sharegpt",
        {"conversation": [{"role": "USER", "content": "Hi"}, {"role": "Assistant", "content": "Hello."}]},
        ASKED,
    ),
    "alpaca": ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, ASKED),
    "alpaca_with_input": ("alpaca", {"instruction": "Sum", "input": "1 2", "output": "3"}, [("user", "Sum\n\n1 2"), ("assistant", "3")]),
    "alpaca_with_system_and_history": (
        "alpaca",
        {"instruction": "Hi", "output": "Hello.", "system": "Be kind.", "history": [["A", "B"]]},
        [("system", "Be kind."), ("user", "A"), ("assistant", "B"), *ASKED],
    ),
    "dolly": (
        "alpaca",
        {"instruction": "Sum", "context": "1 2", "response": "3", "category": "qa"},
        [("user", "Sum\n\n1 2"), ("assistant", "3")],
    ),
    "prompt_completion": ("prompt", {"prompt": "Hi", "completion": " Hello. "}, [("user", "Hi"), ("assistant", " Hello. ")]),
    "question_answer": ("prompt", {"question": "Hi", "answer": "Hello."}, ASKED),
    "openorca": (
        "prompt",
        {"id": "x.1", "system_prompt": "Be kind.", "question": "Hi", "response": "Hello."},
        [("system", "Be kind."), *ASKED],
    ),
    "prompt_of_turns": (
        "prompt",
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]},
        ASKED,
    ),
    "messages_beside_a_prompt": (
        "messages",
        {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        ASKED,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "turns"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_told_from_the_record_and_gives_its_turns(
    tmp_path: Path, kind: str, record: object, turns: list[tuple[str, str]]
) -> None:
    tally = Tally()
    assert said(one(tmp_path, record, tally=tally)) == turns
    assert list(tally.formats.values()) == [kind] and tally.conversations == 1
    assert said(one(tmp_path, record, format=kind)) == turns


def test_real_alpaca_records_keep_text_input_and_place() -> None:
    records = json.loads((FIXTURES / "alpaca.json").read_text())
    lines = (FIXTURES / "alpaca.json").read_text().splitlines()
    found = read(FIXTURES / "alpaca.json")
    assert len(found) == len(records) == 32
    for number, (record, conversation) in enumerate(zip(records, found, strict=True), 1):
        asked, answer = conversation.messages
        assert asked.instruction_and_input == (record["instruction"], record["input"])
        assert record["instruction"] in asked.content and record["input"] in asked.content
        assert answer.content == record["output"]
        place = conversation.source
        assert place.record == number and place.line and lines[place.line - 1].strip() == "{"
    assert sum(c.messages[0].input_at is not None for c in found) == 16


def test_real_qnli_rows_become_question_and_word() -> None:
    rows = [line.split("\t") for line in (FIXTURES / "qnli.tsv").read_text().splitlines()[1:]]
    found = read(FIXTURES / "qnli.tsv")
    assert len(found) == len(rows) == 32
    for line, (row, conversation) in enumerate(zip(rows, found, strict=True), 2):
        question, answer = conversation.messages
        assert question.content == TASKS["qnli"].prompt.format(question=row[1], sentence=row[2])
        assert answer.content == ("yes" if row[3] == "entailment" else "no")
        assert conversation.extra == {"task": "qnli", "label": row[3]} and conversation.id == row[0]
        assert conversation.source == Location(str(FIXTURES / "qnli.tsv"), line)


GLUE = {
    "qnli_numbers": ("x", {"idx": 3, "question": "Q?", "sentence": "S.", "label": 0}, "qnli", "yes"),
    "rte_words": ("x", {"sentence1": "A", "sentence2": "B", "label": "not_entailment"}, "rte", "no"),
    "rte_by_name": ("RTE", {"sentence1": "A", "sentence2": "B", "label": 0}, "rte", "yes"),
    "mrpc": ("x", {"Quality": "1", "#1 ID": "1", "#2 ID": "2", "#1 String": "A", "#2 String": "B"}, "mrpc", "yes"),
    "qqp": ("x", {"question1": "A", "question2": "B", "is_duplicate": "0"}, "qqp", "no"),
    "mnli": ("x", {"sentence1": "A", "sentence2": "B", "gold_label": "neutral"}, "mnli", "maybe"),
    "sst2_by_name": ("SST-2", {"sentence": "A", "label": "1"}, "sst2", "positive"),
    "cola_by_name": ("cola", {"sentence": "A", "label": 0}, "cola", "no"),
}


@pytest.mark.parametrize(("folder", "record", "task", "word"), GLUE.values(), ids=GLUE)
def test_glue_tasks_are_told_by_columns_labels_and_names(
    tmp_path: Path, folder: str, record: dict[str, Any], task: str, word: str
) -> None:
    (tmp_path / folder).mkdir()
    conversation = one(tmp_path / folder, record)
    assert (conversation.extra["task"], conversation.messages[1].content) == (task, word)


def test_columns_of_several_tasks_are_refused_with_the_choice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one\.jsonl:1: keys 'sentence', 'label' may be sst2 or cola; name one with"):
        one(tmp_path, {"sentence": "A", "label": 1})
    assert one(tmp_path, {"sentence": "A", "label": 1}, format="cola").messages[1].content == "yes"


def test_cola_comes_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "CoLA.tsv"
    path.write_text("gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe them rode.\n")
    assert [c.messages[1].content for c in read(path)] == ["yes", "no"]


def test_tools_calls_names_and_weights_are_kept(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1,  "b": 2}'}}
    record = {
        "messages": [
            {"role": "developer", "content": "Use tools."},
            {"role": "user", "content": "1 + 2?", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "3", "weight": 1, "reasoning_content": "easy"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "score": 0.5,
    }
    got = one(tmp_path, record)
    system, user, calls, answer, last = got.messages
    assert (system.role, user.name, calls.content, answer.tool_call_id) == ("system", "ann", "", "c1")
    assert calls.tool_calls[0].function.arguments == '{"a": 1,  "b": 2}' and calls.tool_calls[0].id == "c1"
    assert [message.trained for message in got.messages] == [None, None, False, None, True]
    assert last.extra == {"reasoning_content": "easy"}
    assert got.tools[0]["function"]["name"] == "add" and got.extra == {"score": 0.5}


def test_sharegpt_calls_are_calls(tmp_path: Path) -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "tools": '[{"name": "add"}]',
    }
    tally = Tally()
    got = one(tmp_path, record, tally=tally)
    assert [message.role for message in got.messages] == ["user", "assistant", "tool", "assistant"]
    function = got.messages[1].tool_calls[0].function
    assert function.name == "add" and json.loads(function.arguments) == {"a": 1, "b": 2}
    assert got.tools == ({"name": "add"},) and not tally.notes


def turns(*roles: str, text: str = "x") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role in roles]}


ODD: dict[str, tuple[object, str]] = {
    "user_user": (turns("user", "user", "assistant"), "two turns of the user in a row"),
    "assistant_first": (turns("assistant", "user", "assistant"), "begins with the assistant"),
    "user_last": (turns("user", "assistant", "user"), "ends without the assistant"),
    "system_inside": (turns("user", "system", "assistant"), "system prompt behind the first turn"),
    "tool_alone": (turns("user", "tool", "assistant"), "tool answers where none was called"),
    "empty_system": ({"system": " ", "instruction": "a", "output": "b"}, ""),
    "number": ({"instruction": "1 + 2", "output": 3}, "number taken as text"),
    "untrained": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
                  "no turn marked for training"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "note"), ODD.values(), ids=ODD)
def test_what_is_odd_is_kept_and_noted(tmp_path: Path, record: object, note: str) -> None:
    tally = Tally()
    one(tmp_path, record, tally=tally)
    assert tally.notes == ({note: 1} if note else {}) and not tally.bad


BAD: dict[str, tuple[object, str, str]] = {
    "no_assistant": (turns("user", "user"), "no turn of the assistant", "turns by user"),
    "no_turn": ({"messages": []}, "no turn of the assistant", "turns by nobody"),
    "empty_answer": ({"instruction": "a", "output": " "}, "empty turn of the assistant", "turn 2 of 2"),
    "empty_question": ({"instruction": "", "input": "", "output": "b"}, "empty turn of the user", "turn 1 of 2"),
    "unknown_role": (turns("user", "oracle"), "unknown role", "turn 2 is by 'oracle'; known: system, developer"),
    "no_role": ({"messages": [{"content": "a"}]}, "turn without a role", "turn 1 has 'content'"),
    "turn_is_text": ({"messages": ["a"]}, "turn is not an object", "turn 1 is a str"),
    "null_content": ({"messages": [{"role": "assistant", "content": None}]}, "text is not a string", "turn 1's content is null"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "content is not text",
        "turn 1 has a part of type 'image_url'",
    ),
    "bool": ({"prompt": "a", "completion": True}, "text is not a string", "completion is a bool"),
    "weight": ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight is neither 0 nor 1", "weight 0.5"),
    "call_without_json": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "broken tool call",
        "arguments of 'f' are not a JSON object",
    ),
    "two_systems": ({"system": "a", **turns("system", "user", "assistant", text="b")}, "two system prompts", "one beside"),
    "history": ({"instruction": "a", "output": "b", "history": [["a"]]}, "broken history", "a list of pairs"),
    "not_an_object": ([1], "not a JSON object", "a list"),
    "another_format": ({"instruction": "a", "output": "b"}, "another format", "alpaca, in a file of messages"),
    "unknown_format": ({"text": "a"}, "no list 'messages'", "has 'text'"),
    "question_and_more": ({"prompt": "a", "completion": "b", "context": "c"}, "unknown format", "this file is prompt"),
    "both_lists": ({**turns("user", "assistant"), "conversations": []}, "two formats in one", "messages and sharegpt"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "cause", "detail"), BAD.values(), ids=BAD)
def test_what_is_not_understood_is_counted_and_placed(tmp_path: Path, record: Any, cause: str, detail: str) -> None:
    keys = record.keys() if isinstance(record, dict) else ()
    good: object = {"instruction": "a", "output": "b"} if "instruction" in keys else turns("user", "assistant")
    if "prompt" in keys:
        good = {"prompt": "a", "completion": "b"}
    if cause == "another format":
        good = turns("user", "assistant")
    path, tally = tmp_path / "x.jsonl", Tally()
    path.write_text("\n".join(map(json.dumps, [good, good, record, good])))
    assert len(read(path, tally=tally, max_bad=0.5)) == 3
    assert (tally.records, tally.conversations, tally.refused) == (4, 3, 1)
    assert tally.bad == {cause: 1}
    (example,) = tally.examples
    assert example.startswith(f"{path}:3: {cause} (") and detail in example
    with pytest.raises(UserError, match=r"1 of 4 records .*--max-bad allows 1\.00%.*x\.jsonl:3: .*--max-bad 0\.25"):
        read(path)


def test_unknown_keys_are_named_at_once_with_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"one\.jsonl:1: keys 'text' are of no known format; known are messages"
    ) as told:
        one(tmp_path, {"text": "a"})
    assert told.value.code == 2 and "\n" not in str(told.value)
    with pytest.raises(UserError, match="no format 'chatml'; auto, messages, sharegpt"):
        one(tmp_path, {"text": "a"}, format="chatml")
    for context in ("context", "choices"):  # SQuAD's and a quiz's prompts are more than their question
        with pytest.raises(UserError, match="are of no known format"):
            one(tmp_path, {"question": "a", "answer": "b", context: "c"})


def test_a_double_id_is_noted(tmp_path: Path) -> None:
    path, tally = tmp_path / "x.jsonl", Tally()
    path.write_text("\n".join(json.dumps({"id": i, "prompt": "a", "completion": "b"}) for i in (1, "2", 1)))
    assert [c.id for c in read(path, tally=tally)] == ["1", "2", "1"] and tally.notes == {"id seen before": 1}


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    records = [record for kind, record, _ in FORMATS.values() if kind == "messages"]
    path, target = tmp_path / "x.jsonl", tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    wanted = [*read(path), *read(FIXTURES / "alpaca.json"), *read(FIXTURES / "qnli.tsv")]
    wanted.append(
        Conversation((Message("assistant", "🦙\u2028\x00", extra={"extra": {"a": None}}),), Location("p", None, 3))
    )
    assert write_conversations(iter(wanted), target) == len(wanted)
    assert read(target) == wanted
    before = target.read_bytes()
    write_conversations(read(target), target)
    assert target.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    target, path = tmp_path / "chat.jsonl", tmp_path / "x.jsonl"
    target.write_text("old")
    path.write_text('{"prompt": "a", "completion": "b"}\n{')
    with pytest.raises(UserError, match="1 of 2 records"):
        write_conversations(read_conversations([path]), target)
    assert target.read_text() == "old" and not list(tmp_path.glob("*.tmp"))
