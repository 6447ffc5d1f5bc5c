"""The engine that a folder of parts is made with: chosen on a sample of the input, kept beside the parts, given up when wrong."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import engines, tokenizers
from data_prep.inputs import PARQUET, TEXT, File
from data_prep.options import Options
from data_prep.parts import read_json, remove_part, write_json
from data_prep.plan import PART_NAME
from data_prep.progress import Progress
from data_prep.readers import Reader, Reading

SAMPLE_BYTES, SAMPLE_FILES = 2_000_000, 16  # of the input, for the choice of the engine
LARGE = 1 << 33  # bytes of input from which every engine is loaded and measured: two seconds, where one takes forty
ENGINE = "engine.json"


def _sample(files: Sequence[File], reading: Reading) -> list[str]:
    """Texts from all over the input: the engine is chosen on them."""
    chosen = [files[i * len(files) // min(len(files), SAMPLE_FILES)] for i in range(min(len(files), SAMPLE_FILES))]
    generator, texts, reader = random.Random(0), [], Reader(reading)
    for file in chosen:
        room = SAMPLE_BYTES // len(chosen)
        plain = file.form not in (PARQUET, TEXT) and not file.path.name.endswith((".gz", ".zst"))
        start = int(generator.random() * max(0, file.size - room)) if plain else 0
        for batch in reader.read(file, start, None):
            texts += [text for text in batch.texts if len(text) <= room]
            room -= batch.text_bytes
            if room <= 0:
                break
        reader.close()
    return texts


def choose_engine(
    folder: Path, files: Sequence[File], loaded: tokenizers.Tokenizer, options: Options, progress: Progress
) -> str:
    """The engine to work with: as chosen before in this folder, or chosen now; engines that proved wrong never again."""
    held = _held(folder)
    asked = {"wanted": options.engine, "tokenizer": tokenizers.sha256(loaded.path), "special": options.parse_special}
    if held.get("asked") == asked and held.get("name"):
        return str(held["name"])
    refused = held.get("wrong", {})
    choice = engines.choose(
        loaded, _sample(files, options.reading), folder, options.engine, refused, options.parse_special,
        compare=sum(file.size for file in files) >= LARGE,
    )  # fmt: skip
    speeds = ", ".join(f"{name} {speed:.0f} MB/s" for name, speed in choice.speeds.items())
    progress.say(f"engine: {choice.name}, the same ids as the official tokenizer on a sample ({speeds} a core)")
    for name, why in choice.refused.items():
        progress.say(f"not {name}: {why}")
    write_json(folder / ENGINE, {"name": choice.name, "asked": asked, "speeds": choice.speeds, "wrong": refused})
    return choice.name


def _held(folder: Path) -> dict[str, Any]:
    return read_json(folder / ENGINE)


def give_up(folder: Path, engine: str, why: str) -> None:
    held = _held(folder)
    write_json(folder / ENGINE, {"wrong": {**held.get("wrong", {}), engine: why}})
    for path in folder.glob("*.json"):
        if not PART_NAME.search(path.name.removesuffix(".json")):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_text()).get("engine") == engine:
                remove_part(folder, path.name.removesuffix(".json"))
