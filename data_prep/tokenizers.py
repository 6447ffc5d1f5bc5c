"""Tokenizers: SentencePiece, Llama-3's tiktoken ranks and Hugging Face tokenizer.json behind one small protocol.

The kind is told from the file's content. Text is always only text: "</s>" or "<|begin_of_text|>" in a document is
spelled with ordinary tokens and never becomes a control id. Nothing in a tokenizer's files is ever executed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.errors import UserError

if TYPE_CHECKING:
    import tokenizers as hf

# Llama-3's rules for cutting text into words before BPE (Meta's llama-models, models/llama3/tokenizer.py, `pat_str`).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
_LLAMA3_NAMED = {  # places after the ranks that have a name of their own since Llama-3.1; the others are reserved
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# Names to try, in order, where no file says which token ends a document.
EOD_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")  # looked for in a folder, in this order
HF_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# tiktoken's regex overflows its stack on nearly a million spaces in a row; long runs are cut, as Meta's own code does.
_SPACE_RUN, _SPACE_CUT = re.compile(r"\s{100000,}"), 25_000
_SURROGATE = re.compile("[\ud800-\udfff]")
_PROBES = (
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n\tand\ttabs ",
    "naïve façade 12345",
    "日本語 🦙 \u0000",
    "</s><s><unk>",
)


class Tokenizer(Protocol):
    """What the rest of herd may ask of a tokenizer. Ids run from 0 to vocab_size - 1, special tokens included."""

    kind: str  # sentencepiece | tiktoken | huggingface
    path: Path
    vocab_size: int
    bos: int | None
    eod: int | None  # the id that ends a document; None where the tokenizer names none

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOD; control tokens spelled in the text stay text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Raises UserError for an id outside the vocabulary."""

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """Write what AutoTokenizer.from_pretrained(directory) needs to give the same ids.

        `add_bos`: whether transformers puts BOS before each text by itself, as the official Llama tokenizers do.
        """


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from its file, or from a folder that holds tokenizer.json or tokenizer.model.

    Raises UserError when there is none, or when the file is damaged or of a kind that is not known.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no {' or '.join(FILES[:2])} in this folder; name the tokenizer's file", 2)
        path = found[0]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file; check the path", 2) from None
    except OSError as error:
        raise UserError(
            f"{path}: tokenizer cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    if not data.strip():
        raise _damaged(path, "the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the tokenizer itself; run `git lfs pull` where it came from")
    if data[:256].lstrip()[:1] == b"{":
        return HuggingFace(path, data)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data[:512]):
        return Tiktoken(path, data)
    return SentencePiece(path, data)


def sha256(path: str | Path) -> str:
    """Hex digest of a file: which tokenizer made a token file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _damaged(path: Path, cause: str) -> UserError:
    return UserError(f"{path}: damaged or unknown tokenizer: {cause}; fetch it again or name another")


def _in_range(path: Path, ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as plain ints, or UserError: the libraries answer a wrong id by KeyError, by nothing or by a crash."""
    checked = [int(i) for i in ids]
    if checked and (min(checked) < 0 or max(checked) >= vocab_size):
        wrong = next(i for i in checked if not 0 <= i < vocab_size)
        raise UserError(
            f"id {wrong} is outside the vocabulary (0 to {vocab_size - 1}) of {path}; is it another tokenizer's?"
        )
    return checked


def _whole(text: str) -> str:
    """The text with lone surrogates (halves of characters, which UTF-8 cannot hold) replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _transformers_config(bos: str | None, eos: str | None, add_bos: bool, **more: object) -> dict[str, object]:
    """tokenizer_config.json that makes transformers take tokenizer.json as it stands (any release since 4.0)."""
    names = {"bos_token": bos, "eos_token": eos}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: name for key, name in names.items() if name is not None},
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # True would drop spaces before punctuation when decoding
        "model_max_length": int(1e30),  # transformers' own spelling of "no limit"
        **more,
    }


class SentencePiece:
    """A SentencePiece model: Llama-2's tokenizer.model and its kin."""

    kind = "sentencepiece"

    def __init__(self, path: Path, data: bytes) -> None:
        import sentencepiece

        self.path, self._data = path, data
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise _damaged(path, "neither SentencePiece, nor tiktoken ranks, nor JSON") from None
        self.vocab_size: int = self._model.get_piece_size()
        if self.vocab_size == 0:
            raise _damaged(path, "a SentencePiece model without pieces")
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos: int | None = bos if bos >= 0 else None
        self.eod: int | None = eos if eos >= 0 else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(_whole(text))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode([_whole(text) for text in texts], num_threads=1)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._model.decode(_in_range(self.path, ids, self.vocab_size))
        return text

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """tokenizer.model as it is, and a tokenizer.json built from it.

        Raises UserError for models whose rules tokenizer.json cannot say (unigram models, say).
        """
        add_bos = add_bos and self.bos is not None
        directory = Path(directory)
        built = self._build(add_bos)
        built.encode_special_tokens = True  # as encode does, for the comparison alone; not saved
        for probe in _PROBES:
            if built.encode(probe, add_special_tokens=False).ids != self.encode(probe):
                raise UserError(f"{self.path}: tokenizer.json cannot express this model (differs on {probe!r})")
        directory.mkdir(parents=True, exist_ok=True)
        built.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer.model").write_bytes(self._data)
        bos, eos = (None if i is None else self._model.id_to_piece(i) for i in (self.bos, self.eod))
        unknown = self._model.id_to_piece(self._model.unk_id())
        _write_json(directory / "tokenizer_config.json", _transformers_config(bos, eos, add_bos, unk_token=unknown))

    def _build(self, add_bos: bool) -> hf.Tokenizer:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

        spec = _model_spec(self._data)
        model, ids = self._model, range(self.vocab_size)
        if spec["model_type"] != 2:
            raise UserError(f"{self.path}: only BPE models of SentencePiece can be written for transformers")
        pieces = {model.id_to_piece(i): i for i in ids}
        control = [i for i in ids if model.is_control(i) or model.is_unknown(i)]
        scores = {
            model.id_to_piece(i): model.get_score(i)
            for i in ids
            if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
        }
        merges = [
            (piece[:cut], piece[cut:])
            for piece in sorted(scores, key=lambda p: (-scores[p], pieces[p]))
            for cut in _cuts(piece, scores, pieces)
        ]
        built = Tokenizer(
            models.BPE(
                vocab=pieces,
                merges=merges,
                unk_token=model.id_to_piece(model.unk_id()),
                fuse_unk=True,
                byte_fallback=any(model.is_byte(i) for i in ids),
            )
        )
        steps: list[Any] = [normalizers.Precompiled(spec["charsmap"])] if spec["charsmap"] else []
        if spec["remove_extra_whitespaces"]:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        # Prepend, not Metaspace: that one adds no space before text that begins with one, which SentencePiece does.
        steps += [normalizers.Prepend("▁")] if spec["add_dummy_prefix"] else []
        built.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        built.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if spec["add_dummy_prefix"] else []))
        built.add_special_tokens([AddedToken(model.id_to_piece(i), normalized=False) for i in control])
        if add_bos and self.bos is not None:
            built.post_processor = _prefix(model.id_to_piece(self.bos), self.bos)
        return built


def _cuts(piece: str, scores: dict[str, float], pieces: dict[str, int]) -> list[int]:
    """Places where a piece is two pieces, the pair most likely to meet (lowest ids) first."""
    cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]
    return sorted(cuts, key=lambda cut: (pieces[piece[:cut]], pieces[piece[cut:]]))


def _prefix(token: str, number: int) -> Any:
    """Post-processor that puts one token before each text."""
    from tokenizers import processors

    return processors.TemplateProcessing(f"{token}:0 $A:0", f"{token}:0 $A:0 {token}:1 $B:1", [(token, number)])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message's fields; fixed-width ones as bytes.

    Twenty lines spare the protobuf package, whose generated code refuses to load under other releases of itself.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        width = {0: 0, 1: 8, 2: -1, 5: 4}[tag & 7]
        if width == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if width < 0 else width
        yield tag >> 3, data[at : at + size]
        at += size


def _model_spec(data: bytes) -> dict[str, Any]:
    """What tokenizer.json must repeat of a SentencePiece model; defaults as in sentencepiece_model.proto."""
    spec: dict[str, Any] = {
        "model_type": 1,
        "charsmap": b"",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
    }
    names = {2: {3: "model_type"}, 3: {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}}
    for part, value in _fields(data):  # 2 is trainer_spec, 3 is normalizer_spec
        for number, inner in _fields(value) if part in names and isinstance(value, bytes) else ():
            if number in names[part]:
                spec[names[part][number]] = inner
    return spec


class Tiktoken:
    """Llama-3's tokenizer.model: 128,000 lines of "base64 rank", and 256 special tokens that the file does not hold."""

    kind = "tiktoken"

    def __init__(self, path: Path, data: bytes) -> None:
        import tiktoken

        self.path = path
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise _damaged(path, f"line {number} is not 'base64 rank'") from None
        if len(ranks) != LLAMA3_RANKS:
            # Another count is another model's (Llama-4: 200,000), whose split rules and special tokens are not these
            raise _damaged(
                path, f"{len(ranks):,} ranks where Llama-3 has {LLAMA3_RANKS:,} (other kinds: use tokenizer.json)"
            )
        if set(ranks.values()) != set(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise _damaged(path, "ranks are not 0 to 127,999, or a single byte has none")
        self._ranks = ranks
        names = [_LLAMA3_NAMED.get(i) for i in range(256)]
        reserved = iter(range(256))
        self.special = {
            name or f"<|reserved_special_token_{next(reserved)}|>": LLAMA3_RANKS + i for i, name in enumerate(names)
        }
        self._model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.vocab_size = LLAMA3_RANKS + len(self.special)
        self.bos: int | None = self.special["<|begin_of_text|>"]
        self.eod: int | None = self.special["<|end_of_text|>"]

    def encode(self, text: str) -> list[int]:
        text = _whole(text)
        if len(text) >= 100_000 and _SPACE_RUN.search(text):
            return [i for part in _cut_spaces(text) for i in self._model.encode_ordinary(part)]
        return self._model.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(_in_range(self.path, ids, self.vocab_size))

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """tokenizer.json built from the ranks: every way to split a token into two tokens is a merge, in rank order."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        spell = _byte_spelling()
        spelled = {token: "".join(map(spell.__getitem__, token)) for token in self._ranks}
        merges = []
        for token in sorted(self._ranks, key=self._ranks.__getitem__):
            cuts = [cut for cut in range(1, len(token)) if token[:cut] in self._ranks and token[cut:] in self._ranks]
            cuts.sort(key=lambda cut, t=token: (self._ranks[t[:cut]], self._ranks[t[cut:]]))  # type: ignore[misc]
            merges += [(spelled[token[:cut]], spelled[token[cut:]]) for cut in cuts]
        vocab = {spelled[token]: rank for token, rank in self._ranks.items()}
        # ignore_merges: like tiktoken, a word that is a token is that token, whether or not merges lead there
        built = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        built.decoder = decoders.ByteLevel()
        built.add_special_tokens([AddedToken(name, normalized=False) for name in self.special])
        if add_bos and self.bos is not None:
            built.post_processor = _prefix("<|begin_of_text|>", self.bos)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        built.save(str(directory / "tokenizer.json"))
        config = _transformers_config("<|begin_of_text|>", "<|end_of_text|>", add_bos)
        _write_json(directory / "tokenizer_config.json", config)


def _cut_spaces(text: str) -> Iterator[str]:
    """The text in parts, cut inside runs of white space longer than tiktoken's regex can take."""
    start = 0
    for run in _SPACE_RUN.finditer(text):
        for cut in range(run.start() + _SPACE_CUT, run.end(), _SPACE_CUT):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _byte_spelling() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level vocabularies (GPT-2's bytes_to_unicode)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte if byte in plain else 256 + others.index(byte)) for byte in range(256)}


class HuggingFace:
    """A tokenizer.json, with what the files beside it say of its BOS and end of text."""

    kind = "huggingface"

    def __init__(self, path: Path, data: bytes) -> None:
        from tokenizers import Tokenizer

        self.path = path
        try:
            self._model = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise _damaged(path, f"not a tokenizer.json: {str(error).splitlines()[0]}") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" in a text is text
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size == 0:
            raise _damaged(path, "an empty vocabulary")
        self.bos = self._find("bos", BOS_NAMES)
        self.eod = self._find("eos", EOD_NAMES)

    def _find(self, role: str, names: Sequence[str]) -> int | None:
        """The id of a role from the files beside tokenizer.json, else from a well-known name."""
        folder = self.path.parent
        for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
            config = _read_config(folder / file)
            token = config.get(f"{role}_token")
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str) and (number := self._model.token_to_id(name)) is not None:
                return int(number)
            number = config.get(f"{role}_token_id")
            first = number[0] if isinstance(number, list) and number else number
            if isinstance(first, int) and 0 <= first < self.vocab_size:
                return first
        return next((i for name in names if (i := self._model.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(_whole(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._model.encode_batch_fast([_whole(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._model.decode(_in_range(self.path, ids, self.vocab_size), skip_special_tokens=False)
        return text

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """Copies of tokenizer.json and what stands beside it, unchanged; `add_bos` is as those files have it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for file in [self.path, *(self.path.parent / name for name in HF_FILES)]:
            target = directory / ("tokenizer.json" if file == self.path else file.name)
            if file.is_file() and file.resolve() != target.resolve():
                shutil.copyfile(file, target)
        if not (directory / "tokenizer_config.json").exists():
            bos, eos = (None if i is None else self._model.id_to_token(i) for i in (self.bos, self.eod))
            _write_json(directory / "tokenizer_config.json", _transformers_config(bos, eos, add_bos))


def _read_config(path: Path) -> dict[str, Any]:
    """A JSON object beside the tokenizer; empty when there is none. Raises UserError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; repair or remove it") from None
    return value if isinstance(value, dict) else {}
