"""Damaged checkpoints, full disks, other models and other data: what is used instead, and what people are told."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from launch.train import ends_as, explain
from llama.checkpoint_format import SafeReader, damage
from llama.config import Recipe
from llama.run_folder import MANIFEST, complete, step_of
from llama.train import loop
from tests.dist import harness
from tests.dist.runs import Record, run_recipe, spied_train, write_tokens


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def two_steps(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    spied_train(0, run_recipe(folder, prefix, train__steps=2, checkpoint__interval=1))
    return folder


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def _go_on(run: Path, prefix: str, **changes: Any) -> Record:
    return spied_train(0, run_recipe(run, prefix, train__steps=3, checkpoint__interval=1, **changes))


def _truncate(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(change(manifest)))

    return apply


def _index(content: bytes) -> Callable[[Path], None]:
    """Another index, with a manifest that vouches for it: what a forger would do, checksums being no signature."""

    def apply(folder: Path) -> None:
        (folder / ".metadata").write_bytes(content)
        _manifest(lambda m: m["files"].update({".metadata": (len(content), zlib.crc32(content))}) or m)(folder)

    return apply


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncate,
    "one bit flipped": _flip,
    "index missing": lambda folder: (folder / ".metadata").unlink(),
    "part missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    "manifest empty": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest not text": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00garbage"),
    "manifest a list": _manifest(lambda m: [1, 2]),
    "manifest without state": _manifest(lambda m: m.pop("state") and m),
    "state of no known keys": _manifest(lambda m: m | {"state": {"steps": 3}}),
    "files a list": _manifest(lambda m: m | {"files": [1]}),
    "files without sizes": _manifest(lambda m: m | {"files": {".metadata": None}}),
    "manifest of a later format": _manifest(lambda m: m | {"format": 99}),
    "index of garbage": _index(b"not a pickle"),
    "index of another kind": _index(pickle.dumps({"a": 1})),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    kind: str, run: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[kind](run / "checkpoints/step-00000002")
    record = _go_on(run, prefix)
    assert record.error is None
    assert [report.step for report in record.reports] == [2, 3]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "step-00000002 is damaged and passed over" in warnings[0]
    assert all(damage(folder, verify=True) is None for folder in complete(run) if step_of(folder) > 1)


def test_when_all_are_damaged_one_clear_error_says_so(run: Path, prefix: str) -> None:
    for folder in complete(run):
        _flip(folder)
    record = _go_on(run, prefix)
    assert record.error is not None and "all 2 checkpoints are damaged" in record.error
    assert "\n" not in record.error and record.reports == []


def test_without_verification_sizes_are_still_compared(run: Path, prefix: str) -> None:
    _truncate(run / "checkpoints/step-00000002")
    assert [r.step for r in _go_on(run, prefix, checkpoint__verify=False).reports] == [2, 3]


def test_a_half_written_folder_is_no_checkpoint_and_is_cleared_away(run: Path, prefix: str) -> None:
    (run / "checkpoints/step-00000002").rename(run / "checkpoints/step-00000002.writing")
    (run / "checkpoints/step-00000009").mkdir()  # removal was interrupted: no manifest any more
    assert [step_of(folder) for folder in complete(run)] == [1]
    assert [r.step for r in _go_on(run, prefix).reports] == [2, 3]
    assert not list((run / "checkpoints").glob("*.writing"))


class _Touch:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _through_an_import(path: Path) -> bytes:
    """A pickle that reaches os.system through a module which torch's own index names."""
    module, name, command = b"torch.distributed.checkpoint.filesystem", b"os.system", f"touch {path}".encode()
    parts = [b"\x8c" + bytes([len(text)]) + text for text in (module, name)]
    return b"\x80\x04" + parts[0] + parts[1] + b"\x93\x8c" + bytes([len(command)]) + command + b"\x85R."


@pytest.mark.parametrize("craft", [lambda path: pickle.dumps(_Touch(path)), _through_an_import])
def test_an_index_that_would_run_code_is_refused_and_runs_nothing(
    craft: Callable[[Path], bytes], run: Path, prefix: str, tmp_path: Path
) -> None:
    content, target = craft(tmp_path / "touched"), run / "checkpoints/step-00000002"
    pickle.loads(content)  # it does run code, when one lets it
    assert (tmp_path / "touched").exists()
    (tmp_path / "touched").unlink()
    _index(content)(target)
    with pytest.raises(pickle.UnpicklingError, match="does not hold"):
        SafeReader(target).read_metadata()
    assert [r.step for r in _go_on(run, prefix).reports] == [2, 3]
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_of_another_model_is_refused_by_naming_the_difference(run: Path, prefix: str) -> None:
    record = _go_on(run, prefix, model__num_layers=2)
    assert record.error is not None and "num_layers: 4 there, 2 here" in record.error
    assert "\n" not in record.error


def test_other_token_files_are_refused_unless_allowed(run: Path, prefix: str, tmp_path: Path) -> None:
    other = write_tokens(tmp_path, seed=1)
    record = _go_on(run, other)
    assert record.error is not None and "data.allow_change=true" in record.error and record.reports == []
    allowed = _go_on(run, other, data__allow_change=True)
    assert [report.step for report in allowed.reports] == [3]


def test_moved_token_files_are_the_same_data(run: Path, prefix: str, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        shutil.copy(f"{prefix}.{kind}", tmp_path / f"moved.{kind}")
    assert [r.step for r in _go_on(run, str(tmp_path / "moved")).reports] == [3]


def _save_into(folder: Path, prefix: str, background: bool) -> list[Record]:
    config: Recipe = run_recipe(
        folder, prefix, train__steps=2, checkpoint__interval=1, checkpoint__save_async=background
    )
    return harness.run(2, spied_train, config, timeout=60)


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_an_unwritable_folder_is_told_on_every_rank(background: bool, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    for record in _save_into(tmp_path, prefix, background):
        assert record.error is not None and "could not be written" in record.error and "\n" not in record.error
        assert "resumes from the checkpoint before" in record.error


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_told_on_every_rank_and_leaves_the_checkpoint_before(
    background: bool, prefix: str, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoints"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "herd-test", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:  # a checkpoint takes about 1 MB: one fits, two do not
        records = _save_into(tmp_path, prefix, background)
        for record in records:
            assert record.error is not None and "No space left on device" in record.error, record.error
            assert "\n" not in record.error
        assert [step_of(folder) for folder in complete(tmp_path)] == [1]
        assert damage(complete(tmp_path)[0], verify=True) is None
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _killed_while(rank: int, place: str, config: Recipe) -> tuple[str, str | None]:
    """The last rank is killed as soon as it reads or writes a checkpoint: how that ends for the others, and the text."""
    if rank == 1:
        if place == "load":
            SafeReader.read_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        else:
            dcp.FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    os.environ["HERD_DEVICE"] = "cpu"
    try:
        loop.train(config)
    except Exception as error:
        return ends_as(error), explain(error)[0]
    return "no error", None


@pytest.mark.parametrize("place", ["load", "save", "save in the background"])
def test_a_rank_killed_at_a_checkpoint_is_not_the_checkpoints_fault(place: str, run: Path, prefix: str) -> None:
    """A job goes on after a lost rank, and gives up on a checkpoint that nobody can write or load."""
    config = run_recipe(run, prefix, train__steps=3, checkpoint__interval=1, checkpoint__save_async="back" in place)
    ((kind, text), _) = harness.run(2, _killed_while, place, config, timeout=60, dying=(1,))
    assert kind == "peer", text
    assert text is not None and "lost another rank" in text and "\n" not in text
