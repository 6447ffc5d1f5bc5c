"""Which template a recipe means, and what it may know of the tokenizer: its own, a built-in one, a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from llama.chat.builtin import NEEDED, TEMPLATES
from llama.chat.template import ChatTemplate

OWN = "tokenizer"  # the template that came with the tokenizer


def load_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template called `name`: tokenizer, a built-in one, or a .jinja file. Raises UserError where it is not there."""
    folder = tokenizer.path.parent
    names = special_names(tokenizer)
    if name in TEMPLATES:
        missing = [token for token in NEEDED[name] if token not in tokenizer.control]
        if missing:
            raise UserError(
                f"chat.template={name} needs the control token {missing[0]}, which {tokenizer.path} lacks; "
                f"use chat.template={OWN} or alpaca",
                2,
            )
        if not NEEDED[name] and "eos_token" not in names:
            raise UserError(f"chat.template={name} ends answers with EOS, and {tokenizer.path} names none", 2)
        names["begin"] = names.get("bos_token", "") if adds_bos(tokenizer) else ""
        return ChatTemplate(name, TEMPLATES[name], tokenizer.control, names)
    if name.endswith(".jinja"):
        try:
            source = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat.template={name}: cannot be read: {error}", 2) from None
        return ChatTemplate(name, source, tokenizer.control, names)
    if name != OWN:
        known = ", ".join((OWN, *TEMPLATES))
        raise UserError(f"chat.template={name}: neither a .jinja file nor one of {known}", 2)
    found = own_template(folder)
    if found is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json); set chat.template to {', '.join(TEMPLATES)} or a .jinja file",
            2,
        )
    return ChatTemplate(str(folder), found, tokenizer.control, names)


def own_template(folder: Path) -> str | None:
    """The chat template of a Hugging Face folder, its default one; None where there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / file).get("chat_template")
        if isinstance(found, list):  # several, by name
            by_name = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            found = by_name.get("default")
        if isinstance(found, str):
            return found
    return None


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, … as the files beside the tokenizer say; else BOS and end of text as the tokenizer has them."""
    folder, names = tokenizer.path.parent, {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _json(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                names[key] = text
    by_id = {number: text for text, number in tokenizer.control.items()}
    for key, number in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eod)):
        if key not in names and number in by_id:
            names[key] = by_id[number]
    return names


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer puts BOS before a text by itself: tokenizer.json says; the official Llama ones do."""
    if tokenizer.bos is None:
        return False
    if tokenizer.kind != "huggingface":
        return True
    processor = json.dumps(_json(tokenizer.path).get("post_processor"))
    name = next((text for text, number in tokenizer.control.items() if number == tokenizer.bos), None)
    return name is not None and json.dumps(name) in processor


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; repair or remove it") from None
    return value if isinstance(value, dict) else {}
