"""Tokenizers: ids as the official ones give, text that stays text, exports that transformers reads alike."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.demo_text import train_tokenizer
from data_prep.errors import UserError
from data_prep.tokenizers import LLAMA3_SPLIT, Tokenizer, load_tokenizer
from tests import material
from tests.oracles import oracle

LANGUAGES = """\
All human beings are born free and equal in dignity and rights; they're endowed with reason, and it's 1948-12-10.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Où l'œuvre n'est-elle pas ?
Все люди рождаются свободными и равными в своём достоинстве и правах.
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักด[เกียรติศักดิ์]และสิทธิ
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια. שלום עולם
def f(x):\n\tif x >= 12345:\r\n        return {"a": [1.5e-7, 'it''s']}   # 🦙👩‍👩‍👧‍👦 e\u0301 \u00a0\u3000|
""".splitlines()
CONTROL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<0x0A>",
    "<pad>",
]


def samples() -> list[str]:
    """Real sentences in a dozen scripts, source code, and random texts of five kinds; the same each time."""
    draw = random.Random(0)
    alphabets = [
        [chr(i) for i in (*range(32, 127), *range(0, 0xD800, 37), *range(0xE000, 0x110000, 511))],
        list(" \n\t\r\u3000\xa0ab."),
        [*CONTROL, " ", "hello", "\n", "▁", "  ", "don't", "123456"],
        list(" ▁a"),
        list("aeiouAE étñ日本のはк"),
    ]
    fuzz = ["".join(draw.choices(letters, k=draw.randrange(120))) for _ in range(60) for letters in alphabets]
    runs = [" " * n + "x" + "\n" * n + " " * n for n in range(40)]
    code = Path(__file__).read_text(encoding="utf-8")
    return [*LANGUAGES, "\n".join(LANGUAGES), code, "", *CONTROL, *runs, *fuzz]


SAMPLES = samples()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 700 pieces trained on the samples: needs no network."""
    folder = tmp_path_factory.mktemp("small")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sample}) + "\n" for sample in LANGUAGES * 3), encoding="utf-8")
    return train_tokenizer(text, folder / "tokenizer.model", vocab_size=700)


@pytest.fixture(scope="module")
def path_of(small: Path) -> Callable[[str], Path]:
    paths = {
        "small": lambda: small,
        "llama2": material.llama2_tokenizer_model,
        "llama3": material.llama3_tokenizer_model,
        "llama3_hf": material.llama3_tokenizer_json,
        "smollm2": material.smollm2_checkpoint,
        "mistral": material.mistral_tokenizer,
    }
    return lambda name: paths[name]()


@pytest.fixture(scope="module")
def load(path_of: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """Each tokenizer by its name in ALL, loaded once."""
    return functools.cache(lambda name: load_tokenizer(path_of(name)))


ALL = ["small", *(pytest.param(n, marks=pytest.mark.network) for n in ("llama2", "llama3", "llama3_hf", "smollm2"))]


@pytest.mark.network
def test_llama3_ids_are_those_of_tiktoken_and_of_the_hugging_face_file(load: Callable[[str], Tokenizer]) -> None:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(material.llama3_tokenizer_model()))
    official = tiktoken.Encoding("l3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    ours, hf = load("llama3"), load("llama3_hf")
    wanted = [official.encode(text, disallowed_special=()) for text in SAMPLES]
    assert ours.encode_batch(SAMPLES) == wanted == [ours.encode(text) for text in SAMPLES]
    assert hf.encode_batch(SAMPLES) == wanted == [hf.encode(text) for text in SAMPLES]
    assert ours.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]  # from Meta's own tests
    for tokenizer in (ours, hf):
        assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (128256, 128000, 128001)
        assert tokenizer.decode([128000, 2028, 374, 128001]) == "<|begin_of_text|>This is<|end_of_text|>"


@pytest.mark.network
@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_sentencepiece_ids_are_those_of_the_library(path_of: Callable[[str], Path], name: str) -> None:
    import sentencepiece

    path = path_of(name)
    official, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    assert ours.kind == "sentencepiece"
    assert ours.encode_batch(SAMPLES) == official.encode(SAMPLES) == [ours.encode(text) for text in SAMPLES]


@pytest.mark.network
def test_llama2_ids_are_those_its_users_published() -> None:
    """Vectors from llama-tokenizer-js, checked there against Meta's own code (without the BOS)."""
    ours = load_tokenizer(material.llama2_tokenizer_model())
    assert (ours.vocab_size, ours.bos, ours.eod) == (32000, 1, 2)
    assert ours.encode(" grabbed") == [29871, 2646, 1327, 287]
    assert ours.encode("           grabbed") == [9651, 2646, 1327, 287]
    assert ours.encode("\ttabs\t\t\t\tout here") == [29871, 12, 21175, 12, 12, 12, 12, 449, 1244]
    assert ours.encode("ax\n####\nboo") == [4853, 13, 4136, 13, 833, 29877]
    assert ours.encode("镇🦙Ꙋ") == [29871, 30411, 243, 162, 169, 156, 237, 156, 141]


@pytest.mark.parametrize("name", ALL)
def test_control_tokens_in_text_stay_text(load: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = load(name)
    control = {tokenizer.bos, tokenizer.eod, *range(128000, 128256)}
    for text in CONTROL:
        ids = tokenizer.encode(f"a {text}{text} b")
        assert not control & set(ids) and max(ids) < tokenizer.vocab_size
        assert tokenizer.decode(ids) == f"a {text}{text} b"


@pytest.mark.parametrize("name", ALL[:-1])  # SmolLM2's vocabulary lacks a few bytes, so it cannot
def test_decoding_gives_the_text_back(load: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = load(name)
    for text in SAMPLES:
        # SentencePiece spells a space as ▁ and cannot tell the two apart afterwards
        wanted = text.replace("▁", " ") if tokenizer.kind == "sentencepiece" else text
        assert tokenizer.decode(tokenizer.encode(text)) == wanted
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([0, tokenizer.vocab_size])
    with pytest.raises(UserError, match="id -1 is outside"):
        tokenizer.decode([-1])


@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_the_export_alike(load: Callable[[str], Tokenizer], tmp_path: Path, name: str) -> None:
    transformers = oracle("transformers")
    ours = load(name)
    ours.save_for_transformers(tmp_path)
    for in_a_checkpoint in (True,) if name.startswith("llama3") else (False, True):  # Llama-3's takes seconds to load
        if in_a_checkpoint:  # transformers may choose another class there
            (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        found = theirs.bos_token_id, theirs.eos_token_id, len(theirs)
        assert found == (ours.bos, ours.eod, ours.vocab_size)
        got = theirs(SAMPLES, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert got == ours.encode_batch(SAMPLES)
        sentence = "  Hi there , it 's fine ."
        assert theirs.decode(ours.encode(sentence)) == sentence
    again = load_tokenizer(tmp_path)
    assert again.encode_batch(LANGUAGES) == ours.encode_batch(LANGUAGES)
    assert (again.bos, again.eod, again.vocab_size) == (ours.bos, ours.eod, ours.vocab_size)


def test_the_export_adds_bos_as_asked(small: Path, tmp_path: Path) -> None:
    transformers = oracle("transformers")
    ours = load_tokenizer(small)
    for add_bos in (True, False):
        ours.save_for_transformers(tmp_path / str(add_bos), add_bos=add_bos)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(add_bos))
        assert theirs("free").input_ids == [ours.bos] * add_bos + ours.encode("free")


@pytest.mark.network
def test_long_runs_of_white_space_do_not_overflow(load: Callable[[str], Tokenizer]) -> None:
    ours = load("llama3")
    text = "a" + " " * 1_000_000 + "b" + "\n" * 150_000 + "日本"
    assert ours.decode(ours.encode(text)) == text


def test_half_characters_become_the_replacement_character(small: Path) -> None:
    tokenizer = load_tokenizer(small)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_end_of_text_is_found_in_the_files_beside_or_by_name(small: Path, tmp_path: Path) -> None:
    load_tokenizer(small).save_for_transformers(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    config = tmp_path / "tokenizer_config.json"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "tokenizer.json", alone)

    def found() -> tuple[int | None, int | None]:
        loaded: Tokenizer = load_tokenizer(tmp_path)
        return loaded.bos, loaded.eod

    config.write_text('{"eos_token": {"content": "<unk>"}, "bos_token": "</s>"}')
    assert found() == (2, 0)
    config.unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8], "bos_token_id": 9}')
    assert found() == (9, 7)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    assert found() == (9, 1)
    assert (load_tokenizer(alone).bos, load_tokenizer(alone).eod) == (1, 2)
    config.write_text("{broken")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read"):
        found()


def test_added_tokens_count_in_the_vocabulary(small: Path, tmp_path: Path) -> None:
    load_tokenizer(small).save_for_transformers(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["added_tokens"].append({**value["added_tokens"][0], "id": 700, "content": "<|extra|>"})
    path.write_text(json.dumps(value), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert loaded.vocab_size == 701 and 700 not in loaded.encode("<|extra|>")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!doctype html><html>404", "neither SentencePiece, nor tiktoken ranks, nor JSON"),
        (b'{"model": 1}', "not a tokenizer.json"),
        (b"\xff\xfe\x00garbage" * 50, "neither SentencePiece"),
        (b"IQ== 0\nIg== 1\n", "2 ranks where Llama-3 has 128,000"),
        (b"IQ== 0\nIg==\n", "line 2 is not 'base64 rank'"),
        (b"IQ== 0\n*** 1\n", "line 2 is not 'base64 rank'"),
    ],
)
def test_damaged_tokenizers_are_one_line_with_place_and_remedy(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert cause in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_cut_off_model_is_damaged(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or unknown"):
        load_tokenizer(path)


def test_a_missing_tokenizer_is_wrong_use(tmp_path: Path) -> None:
    for path, cause in ((tmp_path, "in this folder"), (tmp_path / "none.model", "no such tokenizer file")):
        with pytest.raises(UserError, match=cause) as error:
            load_tokenizer(path)
        assert error.value.code == 2
