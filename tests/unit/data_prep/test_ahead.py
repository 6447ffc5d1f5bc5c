"""Parts joined while others are made: the merge takes over what is right, and copies anew what is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep import merge as merging
from data_prep.ahead import Ahead, Begun
from data_prep.demo_text import train_tokenizer
from data_prep.inputs import describe
from data_prep.merge import merge_parts
from data_prep.options import Options
from data_prep.plan import Unit, make_plan, settings_digest
from data_prep.tokenize import _settings, tokenize
from data_prep.tokenizers import load_tokenizer
from data_prep.work import done_parts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl and tokenizer.model, and the folder of parts that they make."""
    folder = tmp_path_factory.mktemp("ahead")
    lines = [json.dumps({"text": f"All human beings {i} are born free and equal."}) for i in range(3000)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(folder / "text.jsonl", folder / "tokenizer.model", vocab_size=300)
    tokenize([folder / "text.jsonl"], folder, folder / "whole", OPTIONS)
    tokenize([folder / "text.jsonl"], folder, folder / "out", Options(workers=1, part_bytes=20_000, merge=False))
    return folder


OPTIONS = Options(workers=1, part_bytes=20_000, keep_parts=True)


def units(folder: Path) -> list[Unit]:
    settings = settings_digest(_settings(load_tokenizer(folder), OPTIONS))
    return make_plan([describe(folder / "text.jsonl")], settings, 20_000, True)


def names(folder: Path) -> list[str]:
    return [part.name for unit in units(folder) for part, _ in done_parts(folder / "out.parts", unit)]


def joined(folder: Path, parts: int) -> Begun:
    """What is joined once so many parts were."""
    with Ahead(folder / "out.parts", units(folder)) as ahead:
        end = time.monotonic() + 20
        while len(ahead._copied) < parts and time.monotonic() < end:
            time.sleep(0.01)
    assert ahead.begun is not None
    return ahead.begun


def test_parts_are_joined_in_the_plans_order_up_to_the_first_that_is_missing(corpus: Path, tmp_path: Path) -> None:
    every, parts = names(corpus), corpus / "out.parts"
    assert len(every) > 5
    begun = joined(corpus, len(every))
    assert [name for name, _ in begun.parts] == every
    assert begun.path.read_bytes() == (corpus / "whole.bin").read_bytes()
    begun.path.unlink()
    sidecar = parts / f"{every[3]}.json"
    sidecar.rename(parts / "away")
    begun = joined(corpus, 3)
    (parts / "away").rename(sidecar)
    assert [name for name, _ in begun.parts] == every[:3]
    begun.path.unlink()


@pytest.mark.parametrize("fault", ["none", "content", "digest", "order", "longer", "gone"])
def test_the_merge_gives_the_same_bytes_whatever_was_joined(
    corpus: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = joined(corpus, len(names(corpus)) - 2)
    if fault == "content":
        with begun.path.open("r+b") as file:
            file.seek(1000)
            file.write(b"\xff\xff")
    elif fault == "digest":
        begun = Begun(begun.path, ((begun.parts[0][0], "0" * 32), *begun.parts[1:]))
    elif fault == "order":
        begun = Begun(begun.path, tuple(reversed(begun.parts)))
    elif fault == "longer":
        begun.path.write_bytes(begun.path.read_bytes() + bytes(1_000_000))
    elif fault == "gone":
        begun.path.unlink()
    copied: list[str] = []
    copy = merging.RangeFile.copy_to

    def counted(self: merging.RangeFile, *where: Any) -> None:
        copied.append(self.path)
        copy(self, *where)

    monkeypatch.setattr(merging.RangeFile, "copy_to", counted)
    merge_parts(corpus / "out.parts", tmp_path / "merged", begun=begun)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"merged{ending}").read_bytes() == (corpus / f"whole{ending}").read_bytes()
    assert not begun.path.exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "merged.bin", "merged.idx", "merged.meta.json",
    ]  # fmt: skip
    few = len(names(corpus)) - len(begun.parts)
    assert len(copied) == few if fault in ("none", "longer") else len(copied) > few


def test_workers_and_what_is_joined_meanwhile_leave_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    lines = (corpus / "text.jsonl").read_bytes()
    text = tmp_path / "text.jsonl"
    text.write_bytes(lines)
    tokenize([text], corpus, tmp_path / "out", Options(workers=2, part_bytes=20_000))
    assert (tmp_path / "out.bin").read_bytes() == (corpus / "whole.bin").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.meta.json", "text.jsonl"]
