"""Whatever a conversation holds: no crash, answers trained to the letter, and as many control tokens as its turns have."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep.conversations import Conversation, Location, Message
from data_prep.errors import UserError
from data_prep.tokenizers import load_tokenizer
from llama.chat.choose import load_template
from llama.chat.encode import Encoder
from llama.chat.encoded import open_encoded
from tests.unit.llama.chat.chats import chat_recipe, write_tokenizer

PARTS = (
    "<|im_start|>", "<|im_end|>", "assistant\n", "\n\n", " ", "", "⟦0⟧", "{{ 7 * 7 }}", "{% raw %}", "### Response:",
    "yes", "\ud800", "\x00", "\u202e", "🦙", "é", "\\n", '"', "<|end|>", "x" * 40,
)  # fmt: skip


def some_text(dice: random.Random) -> str:
    return "".join(dice.choice(PARTS) for _ in range(dice.randint(0, 6))) + "."


@pytest.mark.parametrize("template", ["tokenizer", "chatml", "alpaca", "plain"])
def test_odd_texts_stay_texts(tmp_path: Path, template: str) -> None:
    tokenizer, dice = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", letters=256)), random.Random(0)
    encoder = Encoder(tokenizer, load_template(template, tokenizer), "all", "drop", 1 << 20)
    talks = []
    for number in range(300):
        turns = []
        for _ in range(dice.randint(1, 4)):
            turns += [Message("user", some_text(dice)), Message("assistant", some_text(dice))]
        talks.append(Conversation(tuple(turns), Location("fuzz", number)))
    control = set(tokenizer.control.values())
    for conversation, example in zip(talks, encoder.whole(talks), strict=True):
        assert example is not None
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        whole = [text.replace("\ud800", "\ufffd") for text in answers]
        assert tokenizer.decode(example.ids[example.trained]) == "".join(f"{text}<|im_end|>" for text in whole)
        turns_marked = len(conversation.messages) if template in ("tokenizer", "chatml") else 0
        wanted = 2 * turns_marked or len(answers)
        assert sum(int(i) in control for i in example.ids) == wanted
    assert not encoder.counts


def test_ten_thousand_mangled_records_are_kept_or_refused_with_their_place(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    dice, path = random.Random(1), tmp_path / "mangled.jsonl"
    good = '{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]}'
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for _ in range(10_000):
            line = good
            if dice.random() < 0.5:
                at = dice.randrange(len(line))
                line = (
                    line[:at]
                    + dice.choice(["", '"', "}", "null", "\\ud800", "1", "[", "tool"])
                    + line[at + dice.randint(0, 6) :]
                )
            file.write(line + "\n")
    recipe = chat_recipe(tmp_path, path, chat__max_bad=1.0, chat__format="messages")
    facts = open_encoded(recipe, recipe.data.train).facts
    refused = sum(n for what, n in facts["counts"].items() if what.startswith("refused"))
    dropped = sum(n for what, n in facts["counts"].items() if "dropped" in what or what == "nothing trained")
    assert facts["records"] == 10_000 == facts["conversations"] + sum(facts["unreadable"].values()) + refused + dropped
    assert all("mangled.jsonl:" in place for place in (*facts["unreadable_first"], *facts["first"].values()))
    strict = chat_recipe(tmp_path, path, chat__format="messages")
    with pytest.raises(UserError, match=r"of 10,000 records are left out .* First: .*mangled\.jsonl:\d+"):
        open_encoded(strict, strict.data.train)
    assert json.dumps(facts)
