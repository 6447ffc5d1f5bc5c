"""Fast engines: the official ids or none, on one thread, and a reason for each that is not taken."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import engines
from data_prep.demo_text import train_tokenizer
from data_prep.engines.kinds import FAST, Official
from data_prep.engines.probes import fuzz
from data_prep.engines.spaces import with_spaces
from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.tokenizers.base import Flat
from tests import material
from tests.oracles import oracle

SENTENCES = ["All human beings are born free and equal in dignity and rights.", "日本語 naïve 🦙 123\n\n\tx"] * 30
ASCII = " ".join(map(chr, range(33, 127)))  # of which a vocabulary for these sentences has to have each
HARD = ["", " ", "</s><|begin_of_text|> a", "a\ud800b", "x" + " " * 250_000 + "y" + "\n" * 99_999 + "z", "\x04\x06 é\t"]
HARD += ["▁", "▁▁ a▁b  ▁ ▁c", "日▁ 本  ▁é   ▁"]  # what SentencePiece writes for a space, in the text itself
PATHS = {
    "llama2": material.llama2_tokenizer_model,
    "llama3": material.llama3_tokenizer_model,
    "llama3_hf": material.llama3_tokenizer_json,
    "smollm2": material.smollm2_checkpoint,
    "mistral": material.mistral_tokenizer,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    text = folder / "text.jsonl"
    lines = "".join(json.dumps({"text": sentence}) + "\n" for sentence in [*SENTENCES, ASCII])
    text.write_text(lines, encoding="utf-8")
    return train_tokenizer(text, folder / "tokenizer.model", vocab_size=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tokenizer.json of engines are kept."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def load(small: Path) -> Callable[[str], Tokenizer]:
    return functools.cache(lambda name: load_tokenizer(small if name == "small" else PATHS[name]()))


def model(folder: Path, **settings: object) -> Tokenizer:
    """A SentencePiece model of other settings than Llama's."""
    import sentencepiece

    defaults = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "normalization_rule_name": "identity"}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, ASCII]), model_writer=written, minloglevel=2, **{**defaults, **settings}
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return load_tokenizer(folder)


class Wrong:
    """An engine that is wrong wherever it meets a llama, and fails on an alpaca."""

    name, special = "fastokens", False

    def __init__(self, tokenizer: Tokenizer, json: str = "", special: bool = False) -> None:
        self.tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        if any("alpaca" in text for text in texts):
            raise RuntimeError("no alpacas\nplease")
        return self.tokenizer.encode_flat([text.replace("🦙", "lama") for text in texts])


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("small", False),
        ("small", True),
        # Llama-3's as JSON take seconds to load: each once
        *(pytest.param(n, n == "llama3_hf", marks=pytest.mark.network) for n in PATHS),
        *(pytest.param(n, True, marks=pytest.mark.network) for n in ("llama2", "mistral", "smollm2")),
    ],
)
def test_fast_engines_give_the_official_ids(
    load: Callable[[str], Tokenizer], folder: Path, name: str, special: bool
) -> None:
    tokenizer = load(name)
    texts = [*SENTENCES, *HARD, *fuzz(600, seed=2), *tokenizer.control, *tokenizer.symbols]
    texts += [f"a{name} {name} b" for name in (*tokenizer.control, *tokenizer.symbols)]
    tried = 0
    for kind in FAST:
        try:
            engine = engines.load_engine(kind.name, tokenizer, folder, special)
        except UserError as error:  # gigatoken is no dependency, and cannot take a vocabulary that lacks bytes
            assert kind.name == "gigatoken" and str(error)
            continue
        tried += 1
        if kind.name == "fastokens":  # gigatoken 0.10.0 is wrong for Llama-3 on rare bytes, and refused for it
            assert engines.check(engine, tokenizer, texts) is None
        assert engines.check(engine, tokenizer, [*SENTENCES, *HARD]) is None
        ids, lengths = engine.encode_flat(texts)
        assert (ids.dtype, lengths.dtype, len(ids)) == (np.uint32, np.int64, lengths.sum())
        assert [part.tolist() for part in engine.encode_flat([])] == [[], []]
    assert tried


@pytest.mark.parametrize("name", ["small", *(pytest.param(n, marks=pytest.mark.network) for n in ("mistral",))])
def test_a_fast_engine_is_chosen_and_certified(load: Callable[[str], Tokenizer], folder: Path, name: str) -> None:
    tokenizer = load(name)
    choice = engines.choose(tokenizer, SENTENCES, folder)
    assert choice.name == "fastokens"  # a sample as small as this decides nothing about speed
    assert choice.sample_bytes == sum(len(text.encode()) for text in SENTENCES)
    assert set(choice.speeds) | set(choice.refused) == set(engines.ENGINES)
    quick = engines.choose(tokenizer, SENTENCES, folder, compare=False)
    assert quick.name == "fastokens" and set(quick.speeds) == {"official", "fastokens"} and not quick.refused
    assert engines.choose(tokenizer, SENTENCES, folder, "official").name == "official"
    refused = engines.choose(tokenizer, SENTENCES, folder, refused=["fastokens"])
    assert refused.name != "fastokens" and refused.refused["fastokens"]


def test_an_engine_that_differs_is_refused_with_the_text_and_its_ids(
    load: Callable[[str], Tokenizer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load("small")
    monkeypatch.setattr("data_prep.engines.kinds.FAST", (Wrong,))
    monkeypatch.setattr("data_prep.engines.choice.FAST", (Wrong,))
    choice = engines.choose(tokenizer, SENTENCES, folder)
    assert choice.name == "official" and "differs from the official tokenizer on '" in choice.refused["fastokens"]
    with pytest.raises(UserError, match=r"fastokens differs from the official tokenizer on '.*': from id \d+ on \["):
        engines.choose(tokenizer, SENTENCES, folder, "fastokens")
    engine = Wrong(tokenizer)
    assert engines.check(engine, tokenizer, ["a", "b", "c 🦙 d", "🦙"]) == 2
    assert engines.check(engine, tokenizer, ["a", "b"]) is None
    monkeypatch.setattr("data_prep.engines.choice.probes", lambda tokenizer: ["alpaca"])
    assert engines.choose(tokenizer, ["a"], folder).refused["fastokens"].startswith("fastokens failed: no alpacas;")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"model_type": "unigram", "vocab_size": 370}, "only BPE models"),
        ({"normalization_rule_name": "nmt_nfkc"}, "fastokens"),
        ({"remove_extra_whitespaces": True}, "fastokens"),
        ({"user_defined_symbols": ["a b"], "remove_extra_whitespaces": False}, "the user's symbols"),
        ({"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False}, "differs"),
    ],
    ids=["unigram", "nfkc", "strip", "symbols", "suffix"],
)
def test_models_that_no_fast_engine_expresses_are_left_to_the_official_one(
    tmp_path: Path, settings: dict[str, object], cause: str
) -> None:
    choice = engines.choose(model(tmp_path, **settings), SENTENCES, tmp_path)
    assert choice.name == "official" and cause in choice.refused["fastokens"]
    assert "\n" not in choice.refused["fastokens"]


def test_an_engine_that_takes_text_for_control_tokens_is_refused(tmp_path: Path) -> None:
    """fastokens 0.3.5 does, where the vocabulary has no "<": it then finds "<unk>" as a whole."""
    jsonl = tmp_path / "text.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES), encoding="utf-8")
    tokenizer = load_tokenizer(train_tokenizer(jsonl, tmp_path / "tokenizer.model", vocab_size=400))
    choice = engines.choose(tokenizer, SENTENCES, tmp_path)
    assert choice.name != "fastokens" and "differs from the official" in choice.refused["fastokens"]


def test_symbols_of_a_user_are_found_by_the_official_tokenizer(tmp_path: Path) -> None:
    tokenizer = model(tmp_path, user_defined_symbols=["<sep>", "eq"], remove_extra_whitespaces=False)
    engine = engines.load_engine("fastokens", tokenizer, tmp_path)
    texts = ["free", "free<sep>equal", "born", "and", "equal"]
    assert engines.check(engine, tokenizer, texts) is None
    assert tokenizer.symbols == ["<sep>", "eq"] and len(tokenizer.encode("<sep>")) == 2


def test_only_vocabularies_that_stay_the_same_are_told_to_an_engine_with_spaces(
    load: Callable[[str], Tokenizer],
) -> None:
    spec = json.loads(load("small").as_json())
    prefix, replace = spec["normalizer"]["normalizers"]

    def spaced(**changes: object) -> dict[str, Any] | None:
        text = with_spaces(json.dumps({**spec, **changes}, ensure_ascii=False))
        return None if text is None else dict(json.loads(text))

    told = spaced()
    assert told is not None and told["normalizer"] == {"type": "Prepend", "prepend": " "}
    assert "▁" not in json.dumps(told, ensure_ascii=False) and len(told["model"]["vocab"]) == len(
        spec["model"]["vocab"]
    )
    bare = spaced(normalizer=replace)
    assert bare is not None and bare["normalizer"] is None
    token = {"id": 499, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    assert spaced(added_tokens=[{**token, "content": "<x>"}]) is not None
    vocab = spec["model"]["vocab"]
    without = {piece: number for piece, number in vocab.items() if piece != "▁"}
    for refused in (
        spaced(normalizer=prefix),
        spaced(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, prefix, replace]}),
        spaced(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
        spaced(model={**spec["model"], "vocab": {**vocab, "a b": 500}}),
        spaced(model={**spec["model"], "vocab": without}),
        spaced(added_tokens=[{**token, "content": "<begin▁of>"}]),
        spaced(added_tokens=[{**token, "content": "<x>", "normalized": True}]),
    ):
        assert refused is None


def test_the_built_json_is_kept_and_found_again(load: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    tokenizer = load("small")
    for _ in range(2):
        engines.load_engine("fastokens", tokenizer, tmp_path / "new")
        (kept,) = (tmp_path / "new").iterdir()
    before = kept.stat().st_mtime_ns
    engines.load_engine("fastokens", tokenizer, tmp_path / "new", special=True)
    assert len(list((tmp_path / "new").iterdir())) == 2 and kept.stat().st_mtime_ns == before


def test_unknown_and_missing_engines_are_wrong_use(
    load: Callable[[str], Tokenizer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load("small")
    for call in (engines.load_engine, lambda name, *rest: engines.choose(rest[0], [], rest[1], name)):
        with pytest.raises(UserError, match="no engine 'quick'; there are") as error:
            call("quick", tokenizer, folder)
        assert error.value.code == 2
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with pytest.raises(UserError, match="fastokens is not installed") as error:
        engines.load_engine("fastokens", tokenizer, folder)
    assert error.value.code == 2
    assert "not installed" in engines.choose(tokenizer, [], folder).refused["fastokens"]


def test_a_fast_engine_works_on_one_thread(small: Path, tmp_path: Path) -> None:
    program = """
import os, sys, threading
from pathlib import Path
from data_prep import engines
from data_prep.tokenizers import load_tokenizer
cpus = os.sched_getaffinity(0)
engine = engines.load_engine("fastokens", load_tokenizer(sys.argv[1]), Path(sys.argv[2]))
assert os.sched_getaffinity(0) == cpus
before, seen, done = len(os.listdir("/proc/self/task")), set(), threading.Event()
def watch():
    while not done.wait(0.001):
        seen.add(len(os.listdir("/proc/self/task")))
watcher = threading.Thread(target=watch)
watcher.start()
engine.encode_flat(["All human beings are born free. " * 500] * 500)
done.set()
watcher.join()
print(max(seen) - before - 1)
"""
    if not os.path.exists("/proc/self/task"):  # noqa: PTH110
        pytest.skip("threads are counted in /proc")
    command = [sys.executable, "-c", program, str(small), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "0"


def _theirs(tokenizer: Tokenizer, folder: Path) -> Callable[[str], list[int]]:
    """How transformers encodes with the export, control tokens and all."""
    tokenizer.save_for_transformers(folder, add_bos=False)
    loaded = oracle("transformers").AutoTokenizer.from_pretrained(folder)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["small", *(pytest.param(n, marks=pytest.mark.network) for n in PATHS)])
def test_control_tokens_become_ids_for_who_asks(load: Callable[[str], Tokenizer], tmp_path: Path, name: str) -> None:
    tokenizer = load(name)
    names = sorted(tokenizer.control)[:8]
    texts = [f"a{x}b {x} c{x}{x}\n{x}" for x in names] + ["".join(names), *names, *SENTENCES[:2]]
    got = tokenizer.encode_batch(texts, special=True)
    assert got[len(names)] == [tokenizer.control[x] for x in names]
    assert got == [tokenizer.encode(text, special=True) for text in texts]
    ids, lengths = Official(tokenizer, special=True).encode_flat(texts)
    assert ids.tolist() == [i for each in got for i in each] and lengths.tolist() == list(map(len, got))
    if name == "llama3":
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        from data_prep.tokenizers import LLAMA3_SPLIT

        ranks = load_tiktoken_bpe(str(tokenizer.path))
        own = tiktoken.Encoding("l3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=tokenizer.control)
        assert got == [own.encode(text, allowed_special="all") for text in texts]
    else:
        theirs = _theirs(tokenizer, tmp_path)
        assert got == [theirs(text) for text in texts]
