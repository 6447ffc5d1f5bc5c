"""Streams and line ranges: each line belongs to one range, whatever the ranges, blocks and packings."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from data_prep import streams
from data_prep.streams import DamageError, LineRange, Overlong, Stream

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip_of_two_members": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "gzip_padded": lambda data: gzip.compress(data) + b"\0" * 512,
    "zstd": lambda data: zstandard.compress(data),
    "zstd_of_two_frames": lambda data: zstandard.compress(data[:1000]) + zstandard.compress(data[1000:]),
    "zstd_with_a_skippable_frame": lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(data),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes exercise what takes gigabytes otherwise."""
    monkeypatch.setattr(streams, "PLAIN_BLOCK", 37)
    monkeypatch.setattr(streams, "PACKED_BLOCKS", {streams.GZIP: 23, streams.ZSTD: 23})


def lines_of(path: Path, cuts: list[int], block: int = 64, longest: int = 1 << 20, keep: bool = False) -> list[object]:
    """All lines of a file read range by range; `keep` goes on with one stream, else each range opens its own."""
    found: list[object] = []
    stream = Stream(path)
    for start, stop in pairwise([*cuts, None]):
        assert start is not None
        if not keep:
            stream.close()
            stream = Stream(path)
        lines = LineRange(stream, start, stop, block, longest)
        for _, data in lines:
            whole = [data.size] if isinstance(data, Overlong) else bytes(data).splitlines(keepends=True)
            found += [len(x.rstrip(b"\n")) if isinstance(x, bytes) and len(x) > longest + 1 else x for x in whole]
        assert not lines.damage
    assert lines.ended
    stream.close()
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("keep", [False, True], ids=["opened_anew", "gone_on"])
def test_each_line_is_in_one_range_whatever_the_ranges(tmp_path: Path, packing: str, keep: bool) -> None:
    draw = random.Random(packing)
    for ending in (b"", b"\n"):
        parts = [bytes(draw.choices(b"ab\xc3\xa9 ", k=draw.choice([0, 1, 5, 40, 300]))) for _ in range(80)]
        data = b"\n".join(parts) + ending
        path = tmp_path / "a"
        path.write_bytes(PACKINGS[packing](data))
        wanted = data.splitlines(keepends=True)
        for _ in range(12):
            cuts = sorted({0, *draw.choices(range(1, len(data) + 50), k=draw.choice([0, 1, 3, 30]))})
            assert lines_of(path, cuts, draw.choice([1, 50, 4000]), keep=keep) == wanted, cuts


@pytest.mark.usefixtures("small_blocks")
def test_a_range_knows_whether_more_begins_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345678\n12345678\n1234")
    for stop, ended in ((9, False), (10, False), (18, False), (19, True), (22, True), (99, True)):
        with Stream(path) as stream:
            lines = LineRange(stream, 0, stop, 64, 99)
            assert sum(len(data) for _, data in lines if not isinstance(data, Overlong)) > 0
            assert lines.ended == ended, stop


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path: Path, packing: str) -> None:
    long, path = b"x" * 5000, tmp_path / "a"
    path.write_bytes(PACKINGS[packing](b"a\n" + long + b"\nb\nc\n" + long + b"y"))
    assert lines_of(path, [0], longest=100) == [b"a\n", 5000, b"b\n", b"c\n", 5001]
    assert lines_of(path, [0, 1, 3000, 5003], longest=100) == [b"a\n", 5000, b"b\n", b"c\n", 5001]


@pytest.mark.parametrize("packing", [name for name in PACKINGS if name not in ("plain", "gzip_padded")])
def test_what_comes_before_a_damage_is_the_same_from_anywhere(tmp_path: Path, packing: str) -> None:
    draw = random.Random(1)
    data = b"".join(b"%d %d\n" % (i, draw.getrandbits(200)) for i in range(4000))
    packed, path = PACKINGS[packing](data), tmp_path / "a"
    # a flipped bit in gzip's checksum; zstd's is optional, and absent here
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:] if "gzip" in packing else packed[:-1]
    for damaged in (
        packed[:-20],
        packed[: len(packed) // 2],
        packed + b"rubbish",
        flipped,
    ):
        path.write_bytes(damaged)
        seen = []
        for cuts in ([0], [0, 60_000], [0, 30_000, 60_000, 90_000]):
            found, cause, cut = [], "", 0
            for start, stop in pairwise([*cuts, None]):
                assert start is not None
                with Stream(path) as stream:
                    lines = LineRange(stream, start, stop, 4096, 1 << 20)
                    found += [line for _, block in lines for line in bytes(block).splitlines()]  # type: ignore[arg-type]
                cause, cut = cause or lines.damage, cut or lines.cut_bytes
                if lines.ended:
                    break
            assert found == data.splitlines()[: len(found)]
            assert "gzip data" in cause or "zstd data" in cause
            seen.append((found, cause, cut))
        assert seen[0] == seen[1] == seen[2]


def test_reading_on_after_a_damage_says_so_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(b"x" * 1000)[:-5])
    with Stream(path) as stream, pytest.raises(DamageError, match="ends in the middle"):
        while True:
            stream.read()
