"""Cleaning filters as options of a verb."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

SHARE = click.FloatRange(0, 1)


class NgramLimit(click.ParamType):
    """N:SHARE, as 2:0.2."""

    name = "N:SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        number, _, share = str(value).partition(":")
        try:
            pair = int(number), float(share)
        except ValueError:
            pair = (0, 0.0)
        if not (pair[0] >= 1 and 0 <= pair[1] <= 1):
            self.fail(f"{value!r} is not N:SHARE, as 2:0.2 (words, share from 0 to 1)", param, ctx)
        return pair


# in the order of --help; names are the fields of data_prep.filters.Filters
OPTIONS = (
    click.option("--min-chars", type=click.IntRange(0), metavar="N", help="Leave out shorter texts."),
    click.option("--max-chars", type=click.IntRange(1), metavar="N", help="Leave out longer texts."),
    click.option("--min-words", type=click.IntRange(0), metavar="N", help="Leave out texts of fewer words."),
    click.option("--max-words", type=click.IntRange(1), metavar="N", help="Leave out texts of more words."),
    click.option(
        "--language", "languages", multiple=True, metavar="TAG",
        help="Leave out other languages, by the record's tag; may be given more than once. en allows en-US too.",
    ),
    click.option(
        "--language-key", metavar="PATH",
        help="Where the tag is. [default: meta.language, metadata.identification.label, metadata.language, language, lang]",
    ),
    click.option(
        "--min-language-score", type=SHARE, metavar="P",
        help="Leave out records whose tag has a smaller probability beside it.",
    ),
    click.option("--max-symbol-share", type=SHARE, metavar="SHARE", help="# or … for each word. [Gopher: 0.1]"),
    click.option(
        "--max-line-repetition", type=SHARE, metavar="SHARE", help="Lines that were there before. [Gopher: 0.3]"
    ),
    click.option(
        "--max-paragraph-repetition", type=SHARE, metavar="SHARE", help="The same of paragraphs. [Gopher: 0.3]"
    ),
    click.option(
        "--max-line-repetition-chars", type=SHARE, metavar="SHARE",
        help="Characters in repeated lines, of all. [Gopher: 0.2]",
    ),
    click.option(
        "--max-paragraph-repetition-chars", type=SHARE, metavar="SHARE", help="The same of paragraphs. [Gopher: 0.2]"
    ),
    click.option(
        "--max-ngram-repetition", type=NgramLimit(), multiple=True, metavar="N:SHARE",
        help="Characters in the top n-gram of words (n up to 4) or in repeated ones (from 5), of all;"
        " may be given more than once. [Gopher: 2:0.20 3:0.18 4:0.16 5:0.15 ... 10:0.10]",
    ),
    click.option("--gopher", is_flag=True, help="Gopher's limits (Rae et al. 2021) for all that the options leave open."),
)  # fmt: skip


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command; they reach it as one argument, `filters`. All are off by default."""
    names = (
        "min_chars", "max_chars", "min_words", "max_words", "languages", "language_key", "min_language_score",
        "max_symbol_share", "max_line_repetition", "max_paragraph_repetition", "max_line_repetition_chars",
        "max_paragraph_repetition_chars", "max_ngram_repetition",
    )  # fmt: skip

    @functools.wraps(function)
    def wrapped(*args: Any, gopher: bool, **options: Any) -> Any:
        from data_prep.filters import GOPHER, Filters

        given = {name: options.pop(name) for name in names}
        chosen = {name: value for name, value in given.items() if value not in (None, ())}
        return function(*args, filters=Filters(**({**GOPHER, **chosen} if gopher else chosen)), **options)

    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped
