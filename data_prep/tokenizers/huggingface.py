"""A tokenizer.json, with what the files beside it say of its BOS and end of text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizers.base import Flat, damaged, flat, in_range, transformers_config, whole, write_json

# Names to try, in order, where no file says which token ends a document.
EOD_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
HF_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class HuggingFace:
    """A loaded tokenizer.json. Meanings of methods: see `base.Tokenizer`."""

    kind = "huggingface"
    symbols: tuple[str, ...] = ()

    def __init__(self, path: Path, data: bytes) -> None:
        from tokenizers import Tokenizer

        self.path, self._data = path, data
        try:
            self._model = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise damaged(path, f"not a tokenizer.json: {str(error).splitlines()[0]}") from None
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size == 0:
            raise damaged(path, "an empty vocabulary")
        added = self._model.get_added_tokens_decoder()
        self.control: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
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

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        self._model.encode_special_tokens = not special
        batch = self._model.encode_batch_fast([whole(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def encode_flat(self, texts: Sequence[str], special: bool = False) -> Flat:
        return flat(self.encode_batch(texts, special))

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._model.decode(in_range(self.path, ids, self.vocab_size), skip_special_tokens=False)
        return text

    def as_json(self, special: bool = False) -> str:
        value = json.loads(self._data)
        value |= {"truncation": None, "padding": None, "post_processor": None}
        if not special:
            value["added_tokens"] = [token for token in value.get("added_tokens") or () if not token["special"]]
        return json.dumps(value, ensure_ascii=False)

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
            write_json(directory / "tokenizer_config.json", transformers_config(bos, eos, add_bos))


def _read_config(path: Path) -> dict[str, Any]:
    """A JSON object beside the tokenizer; empty when there is none. Raises UserError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; repair or remove it") from None
    return value if isinstance(value, dict) else {}
