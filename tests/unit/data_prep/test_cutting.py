"""Cuts: the pieces of a text have the ids of the whole, whatever the text, wherever the pieces end."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import engines
from data_prep.cutting import Cutter, cutter, encode_long
from data_prep.demo_text import train_tokenizer
from data_prep.engines.probes import fuzz
from data_prep.tokenizers import Tokenizer, load_tokenizer
from tests import material

TEXT = "Tous les êtres humains naissent libres et égaux. 人人生而自由，在尊严上。\n\n\tdef f(x):  # '<|eot_id|>' 123"
PATHS = {
    "llama2": material.llama2_tokenizer_model,
    "mistral": material.mistral_tokenizer,
    "llama3": material.llama3_tokenizer_model,
    "llama3_hf": material.llama3_tokenizer_json,
    "smollm2": material.smollm2_checkpoint,
}
ALL = ["small", "small_json", "metaspace", *(pytest.param(name, marks=pytest.mark.network) for name in PATHS)]


def model(folder: Path, **changed: object) -> Path:
    """A small SentencePiece model with other settings than Llama's."""
    import sentencepiece

    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    given = {**defaults, "remove_extra_whitespaces": False, "vocab_size": 400, **changed}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.replace("\n", " ")] * 30), model_writer=written, minloglevel=2, **given
    )
    path = folder / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    folder = tmp_path_factory.mktemp("small")
    jsonl = folder / "text.jsonl"
    jsonl.write_text((json.dumps({"text": TEXT}) + "\n") * 30, encoding="utf-8")
    small = load_tokenizer(train_tokenizer(jsonl, folder / "tokenizer.model", vocab_size=400))
    written = folder / "json"
    small.save_for_transformers(written)
    spec = json.loads((written / "tokenizer.json").read_text(encoding="utf-8"))
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (folder / "metaspace.json").write_text(json.dumps(spec), encoding="utf-8")
    made = {"small": small.path, "small_json": written / "tokenizer.json", "metaspace": folder / "metaspace.json"}
    return functools.cache(lambda name: load_tokenizer(made[name] if name in made else PATHS[name]()))


def found(tokenizer: Tokenizer, special: bool = False) -> Cutter:
    result = cutter(tokenizer, special)
    assert result is not None
    return result


def assert_pieces_are_the_whole(tokenizer: Tokenizer, cut: Cutter, text: str, seen: int, special: bool = False) -> bool:
    """Cut what is seen of a text, and compare. Says whether there was a cut."""
    at = cut.last_cut(text[:seen])
    assert 0 <= at < max(1, seen)
    if at:
        whole, first, rest = (tokenizer.encode(t, special) for t in (text, text[:at], cut.continuation(text[at:])))
        assert first + rest == whole, (text, at)
    return at > 0


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", ALL)
def test_random_texts_cut_anywhere(load: Callable[[str], Tokenizer], name: str, special: bool) -> None:
    tokenizer, draw = load(name), random.Random(0)
    cut, cuts = found(tokenizer, special), 0
    texts = [*fuzz(300, seed=3), *(f"{a} {b}" for a, b in zip(fuzz(60, seed=4), fuzz(60, seed=5), strict=True)), TEXT]
    for name in [*list(tokenizer.control)[:4], *tokenizer.symbols[:2]]:
        texts += [f"a {name} b{name}\n{name} c\n\n{name}  {name}d", f"{name} x", f" {name}", f"a\n{name} \n"]
    for text in texts:
        for seen in (len(text), draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)):
            cuts += assert_pieces_are_the_whole(tokenizer, cut, text, seen, special)
    assert cuts > 500


WHITE = " \t\n\r\v\f\x1c\x85\xa0\u180e\u200b\u2028\u3000\ufeff▁"


@pytest.mark.parametrize("name", ALL)
def test_nasty_white_space(load: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = load(name)
    cut = found(tokenizer)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.text(st.sampled_from(f"{WHITE}  \n\na1.'s</>字é\ud800"), max_size=40), st.integers(0, 40))
    def holds(text: str, seen: int) -> None:
        assert_pieces_are_the_whole(tokenizer, cut, text, min(seen, len(text)))

    holds()


@pytest.mark.network
@pytest.mark.parametrize("run", [99_999, 100_000, 124_999, 125_000, 150_000, 199_999, 200_000, 260_000])
def test_runs_of_spaces_that_tiktoken_cuts_are_cut_alike(load: Callable[[str], Tokenizer], run: int) -> None:
    tokenizer = load("llama3")
    cut, text = found(tokenizer), "word" + " \n"[run % 2] * run + "end."
    for seen in (len(text), 4 + run, 4 + run - 1):
        assert_pieces_are_the_whole(tokenizer, cut, text, seen)
    kept = len(text[: 4 + run]) - cut.last_cut(text[: 4 + run])
    assert kept <= 4 + run and (kept < 125_000 or run < 200_000)  # what waits for more text is bounded
    assert encode_long(engines.kinds.Official(tokenizer), cut, text, 1000)[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("name", ALL)
def test_a_long_text_is_encoded_block_by_block(load: Callable[[str], Tokenizer], tmp_path: Path, name: str) -> None:
    tokenizer = load(name)
    sizes: list[int] = []

    class Counting(engines.kinds.Official):
        def encode_flat(self, texts):  # type: ignore[no-untyped-def]
            sizes.extend(map(len, texts))
            return super().encode_flat(texts)

    code = Path(__file__).read_text(encoding="utf-8")[:4000]
    for text in (code, "", "x", TEXT * 40 + "n" * 1500 + TEXT * 40, "n" * 1500, "half \ud800 half " * 100):
        sizes.clear()
        ids, lengths = encode_long(Counting(tokenizer), found(tokenizer), text, block=500)
        assert ids.tolist() == tokenizer.encode(text) and lengths.tolist() == [len(ids)]
        assert max(sizes, default=0) <= (2500 if "nnn" in text else 500)


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "unigram", "vocab_size": 306},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["n l"]},
    ],
    ids=["unigram", "nfkc", "strip", "suffix", "across_spaces", "symbols_across_spaces"],
)
def test_where_nothing_proves_a_cut_there_is_none(tmp_path: Path, changed: dict[str, object]) -> None:
    assert cutter(load_tokenizer(model(tmp_path, **changed))) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"byte_fallback": False, "vocab_size": 150},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["ss"]},
    ],
    ids=["unknown", "no_prefix", "symbols"],
)
def test_other_models_are_cut_too(tmp_path: Path, changed: dict[str, object]) -> None:
    tokenizer = load_tokenizer(model(tmp_path, **changed))
    for text in (*fuzz(300, seed=6), TEXT):
        assert_pieces_are_the_whole(tokenizer, found(tokenizer), text, len(text))


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
    ids=["other_words", "normalised", "prefix"],
)
def test_an_unknown_tokenizer_json_is_not_cut(
    load: Callable[[str], Tokenizer], tmp_path: Path, change: dict[str, object]
) -> None:
    spec = json.loads(load("small").as_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}), encoding="utf-8")
    assert cutter(load_tokenizer(tmp_path)) is None


def test_an_added_token_that_takes_the_space_beside_it_forbids_cuts(
    load: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    spec = json.loads(load("small").as_json(special=True))
    for change in ({"special": False}, {"rstrip": True}):
        added = [{**token, **change} for token in spec["added_tokens"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "added_tokens": added}), encoding="utf-8")
        assert cutter(load_tokenizer(tmp_path)) is None
