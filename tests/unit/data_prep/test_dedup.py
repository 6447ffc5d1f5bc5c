"""Dedup of whole files: against a naive O(n²) one, any number of workers, kills, bad lines, packings, stages."""

from __future__ import annotations

import gzip
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner

from data_prep.dedup import Settings, dedup, run
from data_prep.dedup.minhash import bands_for, share_band
from data_prep.dedup.plan import MARKER, make_plan
from data_prep.dedup.shingles import UNSPACED
from data_prep.demo_text import documents
from data_prep.errors import UserError
from data_prep.filters import Filters
from launch.prep.dedup import command

JAPANESE = "日本語の文書には単語の間に空白がありません。それでも重複は見つけなければならない。"
THAI = "ภาษาไทยไม่มีช่องว่างระหว่างคำ แต่เอกสารซ้ำก็ต้องถูกพบและถูกลบออกเช่นกัน"
SURE = Settings(bands=100, rows=1)  # every similar pair shares a band: what goes is what the definition says


def naive_tokens(text: str) -> list[str]:
    """By the definition in shingles.py, character by character."""
    tokens, word = [], ""
    for c in unicodedata.normalize("NFC", text).lower() + " ":
        letter = unicodedata.category(c)[0] in "LMN"
        alone = letter and any(first <= ord(c) <= last for first, last in UNSPACED)
        if (not letter or alone) and word:
            tokens.append(word)
            word = ""
        if alone:
            tokens.append(c)
        elif letter:
            word += c
    return tokens


def naive_set(text: str, n: int = 5) -> set[tuple[str, ...]]:
    tokens = naive_tokens(text)
    return {tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))} if tokens else set()


def naive_kept(texts: list[str], threshold: float = 0.7) -> list[int]:
    """Places of the texts that stay: keep first, exact before near, every pair looked at."""
    kept: list[int] = []
    sets: dict[int, set[tuple[str, ...]]] = {}
    seen: set[str] = set()
    for place, text in enumerate(texts):
        if text in seen:
            continue
        seen.add(text)
        own = naive_set(text)
        if own and any(len(own & sets[k]) / len(own | sets[k]) >= threshold for k in kept):
            continue
        sets[place] = own
        kept.append(place)
    return kept


def edit(text: str, chance: random.Random) -> str:
    """A text with some characters, words or sentences other than before."""
    unit = "" if ord(text[0]) > 0x500 else " "
    parts = list(text) if not unit else text.split(unit)
    for _ in range(chance.randrange(1, 1 + max(2, len(parts) // 20))):
        at = chance.randrange(len(parts))
        parts[at : at + chance.randrange(2)] = [chance.choice(parts) * chance.randrange(2)]
    return unit.join(parts) or "?"


def make_texts(count: int = 300) -> list[str]:
    """Real English prose, Japanese and Thai, and copies: equal, near, and of copies, so that chains arise."""
    chance = random.Random(3)
    prose = [text[:1000] for _, text in documents(0.3)][:60]
    prose += ["".join(chance.sample(s, len(s))) * 2 for s in (JAPANESE, THAI) for _ in range(8)] + ["!!!", "???", "a b"]
    texts = list(prose)
    while len(texts) < count:
        text = chance.choice(texts)
        texts.append(text if chance.random() < 0.15 else edit(text, chance))
    return texts


TEXTS = make_texts()
KEPT = naive_kept(TEXTS)


def write(path: Path, texts: list[str], key: str = "text") -> list[bytes]:
    lines = [json.dumps({key: text, "n": n}, ensure_ascii=n % 3 == 0).encode() + b"\n" for n, text in enumerate(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
    return lines


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".work" not in path.parts
    }


def removed_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def dedup_to(folder: Path, inputs: list[Path], settings: Settings = SURE, **options: Any) -> dict[str, Any]:
    report = dedup(inputs, folder, settings, **{"workers": 1, **options})
    assert report is not None
    return report


def test_what_stays_is_what_a_naive_comparison_of_all_pairs_keeps(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", TEXTS)
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"])
    kept = KEPT
    assert (tmp_path / "out/a.jsonl").read_bytes() == b"".join(lines[place] for place in kept)
    assert 50 < len(kept) == report["kept"] < 250
    for one in removed_of(tmp_path / "out"):
        place, other = one["line"] - 1, one["kept_line"] - 1
        own, kept_set = naive_set(TEXTS[place]), naive_set(TEXTS[other])
        assert other < place and other in kept and place not in kept
        assert one["jaccard"] == pytest.approx(len(own & kept_set) / len(own | kept_set) if own else 1)
        assert (one["kind"] == "exact") == (TEXTS[place] == TEXTS[other])
    assert report["documents"] - report["exact_removed"] - report["near_removed"] == report["kept"]


def test_default_bands_remove_nothing_that_is_not_similar_and_find_nearly_all(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], Settings())
    assert len(KEPT) <= report["kept"] <= len(KEPT) * 1.1
    assert all(one["jaccard"] >= 0.7 for one in removed_of(tmp_path / "out"))


def test_bytes_do_not_depend_on_workers_parts_or_partitions(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"in/{number}.jsonl", TEXTS[number::3])
    dedup_to(tmp_path / "one", [tmp_path / "in"])
    small = Settings(
        bands=100, rows=1, task_bytes=20_000, partition_entries=500
    )  # many tasks, buckets in another order
    dedup_to(tmp_path / "two", [tmp_path / "in"], small, workers=2)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    reports = [json.loads(files.pop("report.json")) for files in (one, two)]
    assert one == two
    for report in reports:
        report.pop("digest")
    assert reports[0] == reports[1]


def test_a_kill_in_any_stage_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/a.jsonl", TEXTS[:150])
    write(tmp_path / "in/b.jsonl", TEXTS[150:])
    settings = Settings(task_bytes=30_000)
    dedup_to(tmp_path / "whole", [tmp_path / "in"], settings)
    calls: list[str] = []
    allowed = [0]
    for name in ("make_signatures", "find_candidates", "make_shingles", "verify"):
        real = getattr(run, name)

        def counted(plan: Any, item: Any, real: Any = real, name: str = name) -> None:
            if len(calls) >= allowed[0]:
                raise KeyboardInterrupt
            real(plan, item)
            calls.append(name)

        monkeypatch.setattr(run, name, counted)
    for allowed[0] in range(1, 100):
        if allowed[0] == 2:  # what a kill -9 leaves
            (tmp_path / "out/.a.jsonl.node.1.tmp").write_bytes(b"half")
            (tmp_path / "out/.work/signatures/.000001.node.1.tmp").write_bytes(b"half")
        try:
            dedup_to(tmp_path / "out", [tmp_path / "in"], settings)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out/report.json").exists()
    tasks = len(make_plan([tmp_path / "in"], tmp_path / "out", settings).tasks)
    assert tasks > 3
    assert [calls.count(name) for name in ("make_signatures", "find_candidates", "make_shingles")] == [tasks, 1, tasks]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out/.work").exists()


def test_a_changed_setting_or_input_makes_anew_only_what_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write(tmp_path / f"in/{name}.jsonl", TEXTS[ord(name) % 2 :: 2])
    made: list[int] = []
    real = run.make_signatures
    monkeypatch.setattr(run, "make_signatures", lambda plan, task: (made.append(task), real(plan, task)))
    write(tmp_path / "in/c.jsonl", TEXTS[:40])
    old, new = Settings(task_bytes=20_000), Settings(task_bytes=20_000, threshold=0.9)
    dedup_to(tmp_path / "out", [tmp_path / "in"], old, keep_work=True)
    first = list(made)
    dedup_to(tmp_path / "out", [tmp_path / "in"], new, keep_work=True)
    assert made == first  # another threshold needs no new signatures
    write(tmp_path / "in/c.jsonl", TEXTS[:50])
    report = dedup_to(tmp_path / "out", [tmp_path / "in"], new, keep_work=True)
    again = made[len(first) :]
    assert again and len(again) < len(first) / 2 and 0 not in again
    dedup_to(tmp_path / "fresh", [tmp_path / "in"], new)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")
    count = len(made)
    assert dedup_to(tmp_path / "out", [tmp_path / "in"], new) == report
    assert len(made) == count  # nothing was left to do


def test_ten_thousand_copies_of_boilerplate_are_compared_once_each(tmp_path: Path) -> None:
    page = " ".join(f"word{n}" for n in range(60))
    write(tmp_path / "a.jsonl", [f"{page} at {n}" for n in range(10_000)])
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], Settings())
    assert report["kept"] == 1 and report["pairs_compared"] < 10_001


def test_a_full_bucket_remembers_its_first_documents_and_the_report_says_so(tmp_path: Path) -> None:
    page = [f"word{n}" for n in range(60)]
    texts = [" ".join([*page, *(f"own{n}x{k}" for k in range(30))]) for n in range(40)]  # J about 0.45: none goes
    write(tmp_path / "a.jsonl", [*texts, *texts[30:]])
    few = Settings(bands=100, rows=1, max_bucket=5)
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], few)
    assert report["documents_in_full_buckets"] > 20 and report["kept"] == 40


BAD = {
    "broken JSON": b'{"text": "a',
    "broken UTF-8": b'{"text": "\xff\xfe"}',
    "no key 'text'": b'{"other": 1}',
    "text is not a string": b'{"text": 5}',
    "empty text": b'{"text": ""}',
    "not a JSON object": b"[1]",
}


def test_bad_lines_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    good = [b'\xef\xbb\xbf{"text": "with a BOM"}', b'{"text": "half \\ud83d", "x": NaN}', b'{"text": "last"}']
    lines = [good[0], *BAD.values(), b"", b"  ", good[1], b"[" * 100_000, good[2]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"7 of 10 lines are bad .*a\.jsonl:2: broken JSON .* --max-bad 0\.7"):
        dedup([tmp_path / "a.jsonl"], tmp_path / "out", Settings())
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], Settings(max_bad=0.8))
    assert (tmp_path / "out/a.jsonl").read_bytes() == b"\n".join(good)
    assert report["bad_causes"] == {**dict.fromkeys(BAD, 1), "broken JSON": 2}
    assert [report[name] for name in ("lines", "blank", "bad", "documents")] == [12, 2, 7, 3]
    listed = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [one["line"] for one in listed] == [2, 3, 4, 5, 6, 7, 11]
    assert [one["cause"] for one in listed] == [*BAD, "broken JSON"]


def test_gzip_and_zstd_come_back_in_their_packing_with_the_same_lines(tmp_path: Path) -> None:
    lines = write(tmp_path / "plain/a.jsonl", TEXTS, key="content")
    data = b"".join(lines)
    (tmp_path / "in/x").mkdir(parents=True)
    (tmp_path / "in/a.jsonl.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    (tmp_path / "in/x/a.jsonl.zst").write_bytes(zstandard.compress(data))
    report = dedup_to(tmp_path / "out", [tmp_path / "in"])
    unpacked = gzip.decompress((tmp_path / "out/a.jsonl.gz").read_bytes())
    assert unpacked == b"".join(lines[place] for place in KEPT)
    empty = zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "out/x/a.jsonl.zst").read_bytes())
    assert empty == b"" and report["files"][1]["kept"] == 0
    assert report["bytes_in"] == 2 * len(data) and report["bytes_out"] == len(unpacked)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(pack("\n".join(json.dumps({"text": text}) for text in TEXTS).encode())[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl: cannot be read after line .* fetch it again"):
        dedup([path], tmp_path / "out", Settings())


def test_single_stages_over_shares_make_the_same_files_as_one_run(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"in/{number}.jsonl", TEXTS[number::4])
    arguments = [str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert CliRunner().invoke(command, [*arguments[:2], str(tmp_path / "whole"), *arguments[3:]]).exit_code == 0
    early = CliRunner().invoke(command, [*arguments, "--stage", "verify"])
    assert early.exit_code == 2 and "parts of --stage signatures are missing" in early.output
    for stage, shares in (("signatures", 3), ("candidates", 1), ("shingles", 2), ("verify", 1), ("write", 3)):
        for share in range(shares):
            environment = {"SLURM_ARRAY_TASK_ID": str(share + 7), "SLURM_ARRAY_TASK_MIN": "7"}
            environment["SLURM_ARRAY_TASK_COUNT"] = str(shares)
            done = CliRunner().invoke(command, [*arguments, "--stage", stage], env=environment)
            assert done.exit_code == 0, done.output
            assert (tmp_path / "out/report.json").exists() == (stage == "write" and share == 2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_equal_tokens_are_exact_duplicates_when_asked_and_near_ones_stay_with_exact_only(tmp_path: Path) -> None:
    texts = ["One, two; three.", "one two   THREE", "!!!", "???", *TEXTS[:40]]
    write(tmp_path / "a.jsonl", texts)
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], Settings(exact="tokens", near=False))
    assert report["exact_removed"] == 1 and report["near_removed"] == 0
    assert removed_of(tmp_path / "out")[0]["line"] == 2


def test_filtered_documents_are_counted_apart_and_cannot_hold_others_back(tmp_path: Path) -> None:
    records = [{"text": TEXTS[0], "lang": "fr"}, {"text": TEXTS[0], "lang": "en"}, {"text": "a", "lang": "en"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = Settings(filters=Filters(languages=("en",), min_chars=5), log_filtered=True)
    report = dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], settings)
    assert report["filtered_causes"] == {"language fr": 1, "too short": 1} and report["bad"] == 0
    assert (tmp_path / "out/a.jsonl").read_text() == json.dumps(records[1]) + "\n"
    assert [json.loads(x)["line"] for x in (tmp_path / "out/filtered.jsonl").read_text().splitlines()] == [1, 3]


def test_an_output_that_is_not_ours_or_lies_in_the_input_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match="lies in the input"):
        dedup([tmp_path / "in"], tmp_path / "in/out")
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(UserError, match="is Parquet; dedup reads JSON Lines"):
        dedup([tmp_path / "a.parquet"], tmp_path / "out")
    with pytest.raises(UserError, match="is an input inside the output folder"):
        dedup([tmp_path / "in/a.jsonl"], tmp_path / "in")
    write(tmp_path / "out/a.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match="exists and is not of herd prep dedup"):
        dedup([tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out" / MARKER).exists()


def test_examples_show_the_difference(tmp_path: Path) -> None:
    text = " ".join(f"word{n}" for n in range(100))
    write(tmp_path / "a.jsonl", [text, text.replace("word50 ", "changed| ")])
    dedup_to(tmp_path / "out", [tmp_path / "a.jsonl"], Settings())
    shown = (tmp_path / "out/examples.md").read_text()
    assert "| **word50** | **changed\\|** |" in shown and "… 26 equal …" in shown


def test_recall_chooses_bands_and_rows_for_the_threshold() -> None:
    bands, rows = bands_for(0.7, 0.98)
    assert share_band(0.7, bands, rows) >= 0.98 > share_band(0.7, bands - 1, rows)
    assert (Settings(recall=0.98).bands, Settings(recall=0.98).rows) == (bands, rows)
