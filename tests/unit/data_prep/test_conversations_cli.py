"""`herd prep conversations`: what a person sees, what is logged aside, and what is left when it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_prep.conversations import read_conversations
from launch.prep.conversations import command

FIXTURES = Path(__file__).parents[2] / "fixtures"


def herd(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(command, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Six lines: three good, two bad, one blank."""
    path = tmp_path / "in" / "messy.jsonl"
    path.parent.mkdir()
    lines = ['{"prompt": "a", "completion": 1}', "{", "", '{"prompt": "a", "completion": "b", "id": 7}',
             '{"prompt": "\\ud800", "completion": "b", "id": 7}', '{"prompt": "ü", "answer": "b", "completion": "c"}']  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_real_sets_of_two_formats_become_one_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "chat.jsonl"
    code, out, _ = herd(FIXTURES / "alpaca.json", FIXTURES / "qnli.tsv", "--output", target)
    assert code == 0 and "64 conversations of 64 records" in out and "alpaca (1 file), qnli (1 file)" in out
    first = json.loads(target.read_text().splitlines()[0])
    assert set(first) == {"messages", "source"} and first["source"]["file"].endswith("alpaca.json")
    again = tmp_path / "again.jsonl"
    assert herd(target, "--output", again)[0] == 0
    assert again.read_bytes() == target.read_bytes() and not list(tmp_path.rglob("*.bad*"))


def test_refused_records_are_shown_and_logged_aside(messy: Path, tmp_path: Path) -> None:
    target = tmp_path / "chat.jsonl"
    code, out, _ = herd(messy, "--output", target, "--max-bad", "0.5")
    assert code == 0 and "3 conversations of 5 records" in out
    for line in ("refused   1 × broken JSON", f"{messy}:2: broken JSON (", "mended    1 × half a character became U+FFFD",
                 "odd       1 × number taken as text", "odd       1 × id seen before"):  # fmt: skip
        assert line in out
    log = [json.loads(line) for line in Path(f"{target}.bad").read_text().splitlines()]
    assert [(entry["line"], entry["cause"]) for entry in log] == [
        (2, "broken JSON"),
        (6, "both 'completion' and 'answer'"),
    ]
    assert json.loads(log[1]["data"])["prompt"] == "ü"
    assert len(list(read_conversations([target]))) == 3


def test_above_the_threshold_nothing_is_written_but_the_log(messy: Path, tmp_path: Path) -> None:
    target = tmp_path / "chat.jsonl"
    code, out, err = herd(messy, "--output", target)
    assert code == 1 and not out and err.count("\n") == 1
    assert err.startswith("herd: 2 of 5 records are not understood (40.00%; --max-bad allows 1.00%)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl.bad", "in"]


def test_the_summary_for_scripts_adds_up(messy: Path, tmp_path: Path) -> None:
    code, out, _ = herd(messy, "--output", tmp_path / "chat.jsonl", "--max-bad", "1", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["records"] == facts["conversations"] + facts["bad_records"] == 5
    assert sum(facts["bad_causes"].values()) == 2 and facts["turns"] == {"2": 3}
    assert facts["formats"] == {str(messy): "prompt"} and facts["bad_log"] == f"{tmp_path}/chat.jsonl.bad"


def test_wrong_use_is_one_line(messy: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((messy, "--output", messy), "is one of the inputs; choose another --output"),
        ((messy.parent, "--output", tmp_path), "is a folder; name the file too"),
        ((tmp_path / "gone", "--output", tmp_path / "x"), "no such file, folder or glob match"),
        ((messy, "--output", tmp_path / "x", "--format", "alpca"), "no format 'alpca'; auto, messages, sharegpt"),
    ):
        code, _, err = herd(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    (tmp_path / "x").write_text("old")
    assert herd(messy, "--output", tmp_path / "x")[0] == 2 and (tmp_path / "x").read_text() == "old"
    assert herd(messy, "--output", tmp_path / "x", "--overwrite", "--max-bad", "1")[0] == 0
