"""Cleaning filters: off by default, each with its cause, limits as the paper counts them."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from data_prep.filters import GOPHER, Filters
from launch.prep.filters import filter_options

PROSE = "The quick brown fox jumps over the lazy dog while nobody in this whole long sentence says a thing twice ever."


def test_nothing_is_rejected_by_default() -> None:
    filters = Filters()
    assert not filters.active and not filters.needs_record
    assert filters.reject("") is None and filters.reject("a\n" * 1000) is None


@pytest.mark.parametrize(
    ("limits", "text", "cause"),
    [
        ({"min_chars": 4}, "abc", "too short"),
        ({"max_chars": 2}, "abc", "too long"),
        ({"min_words": 3}, "one two", "too few words"),
        ({"max_words": 1}, "one two", "too many words"),
        ({"max_symbol_share": 0.1}, "# a # b", "too many symbols"),
        ({"max_symbol_share": 0.1}, "and so on... and so… it goes", "too many symbols"),
        ({"max_line_repetition": 0.3}, "a\nb\na\na", "repeated lines"),
        ({"max_paragraph_repetition": 0.3}, "a\n\nb\n\n\na", "repeated paragraphs"),
        ({"max_line_repetition_chars": 0.2}, "a long line\na long line\nb\nc\nd", "repeated lines by characters"),
        ({"max_paragraph_repetition_chars": 0.2}, "a long one\n\na long one\n\nb", "repeated paragraphs by characters"),
        ({"max_ngram_repetition": ((2, 0.2),)}, "buy now or buy now and buy now", "repeated 2-grams"),
        ({"max_ngram_repetition": ((5, 0.15),)}, "a b c d e f " * 3, "repeated 5-grams"),
    ],
)  # fmt: skip
def test_each_limit_has_its_cause_and_lets_prose_pass(limits: dict[str, Any], text: str, cause: str) -> None:
    filters = Filters(**limits)
    assert filters.active and filters.reject(text) == cause
    ordinary = PROSE if "max_chars" not in limits and "max_words" not in limits else "a"
    assert filters.reject(ordinary) is None


def test_limits_are_allowed_values() -> None:
    assert Filters(min_chars=3, max_chars=3, min_words=1, max_words=1).reject("abc") is None
    assert Filters(max_line_repetition=0.5).reject("a\na") is None


def test_repeated_ngrams_count_each_word_once() -> None:
    text = " ".join("abcdefghij") + " " + " ".join("abcdefghij")  # ten of twenty characters come again
    assert Filters(max_ngram_repetition=((5, 0.5),)).reject(text) is None
    assert Filters(max_ngram_repetition=((5, 0.49),)).reject(text) == "repeated 5-grams"


@pytest.mark.parametrize(
    "record",
    [
        {"meta": {"language": "en"}},  # RedPajama
        {"metadata": {"identification": {"label": "en", "prob": 0.9}}},  # OSCAR
        {"metadata": {"language": "EN"}},
        {"language": "en", "language_score": 0.8},  # FineWeb
        {"lang": "en-US"},
        {"lang": "en_GB"},
    ],
)
def test_language_tags_are_found_where_corpora_put_them(record: dict[str, Any]) -> None:
    filters = Filters(languages=("en",), min_language_score=0.7)
    assert filters.needs_record and filters.reject("text", record) is None
    assert Filters(languages=("de", "fr")).reject("text", record) in ("language en", "language en-us", "language en-gb")


def test_a_tag_that_is_missing_uncertain_or_elsewhere() -> None:
    english = Filters(languages=("en",), min_language_score=0.7)
    assert english.reject("text", {"meta": "a string"}) == "no language tag"
    assert english.reject("text", ["not an object"]) == "no language tag"
    assert (
        english.reject("text", {"metadata": {"identification": {"label": "en", "prob": 0.5}}}) == "language uncertain"
    )
    assert Filters(languages=("en",), language_key="x.tongue").reject("text", {"x": {"tongue": "en"}}) is None


def test_limits_that_no_document_meets_are_refused() -> None:
    with pytest.raises(UserError, match="--min-chars 5 is more than --max-chars 4"):
        Filters(min_chars=5, max_chars=4)
    with pytest.raises(UserError, match="need --language"):
        Filters(min_language_score=0.5)


def test_gopher_lets_prose_pass_and_takes_repetition() -> None:
    filters = Filters(**GOPHER)
    assert filters.reject(PROSE) is None
    assert filters.reject("Buy now!\n" * 20) == "repeated lines"


def test_options_become_filters() -> None:
    got: list[Filters] = []

    @click.command()
    @filter_options
    @click.option("--other")
    def verb(filters: Filters, other: str | None) -> None:
        got.append(filters)

    def call(*words: str) -> Any:
        return CliRunner().invoke(verb, words)

    assert call().exit_code == 0 and got.pop() == Filters()
    call("--language", "en", "--language", "de", "--min-chars", "5", "--max-ngram-repetition", "2:0.2")
    assert got.pop() == Filters(languages=("en", "de"), min_chars=5, max_ngram_repetition=((2, 0.2),))
    call("--gopher", "--max-symbol-share", "0.5")
    assert got.pop() == Filters(**{**GOPHER, "max_symbol_share": 0.5})
    assert call("--max-ngram-repetition", "two").exit_code == 2
