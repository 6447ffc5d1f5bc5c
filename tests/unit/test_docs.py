"""README and docs/ name only what exists: verbs, options, paths, recipes and their keys, tests."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import click
import pytest

from launch import cli
from llama.recipe import CONFIGS, load

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CHANGELOG.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
# Words in backquotes that look like a path and are not one of ours: what a run writes, other projects' files.
NOT_OURS = re.compile(r"^(runs/|data/|RUN/|/|\./|\.\./|exported|step-)|^(curves\.png|herd\.json)$")
FOLDERS = tuple(path.name for path in ROOT.iterdir() if path.is_dir())


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _code(page: str) -> list[str]:
    """What stands in backquotes, and each line of the fenced blocks without its comment."""
    text = _text(page)
    fences = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [re.sub(r"\s+#.*|^#.*", "", line) for block in fences for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [re.sub(r"\s+", " ", part).strip() for part in [*lines, *inline] if part.strip()]


def _herd_commands(page: str) -> list[list[str]]:
    """Each `herd VERB ...` as words."""
    return [shlex.split(part) for part in _code(page) if re.match(r"herd [a-z]", part)]


@pytest.mark.parametrize("page", PAGES)
def test_every_herd_command_is_a_verb_and_its_options_are_known(page: str) -> None:
    for words in _herd_commands(page):
        assert words[1] in cli.VERBS, f"{page}: herd has no verb {words[1]}"
        command = cli.herd.get_command(None, words[1])  # type: ignore[arg-type]
        rest = words[2:]
        if rest and isinstance(command, click.Group):
            context = click.Context(command)
            assert rest[0] in command.list_commands(context), f"{page}: herd {words[1]} has no {rest[0]}"
            command, rest = command.get_command(context, rest[0]), rest[1:]
        assert command is not None
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{page}: {shlex.join(words)}: no option {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_that_is_trained_loads_with_its_overrides(page: str) -> None:
    # After a path or the verb; the recipe's name, then its overrides.
    for part in _code(page):
        found = re.match(r"(?:herd train|sbatch (?:--nodes \d+ )?run\.slurm) (\w[\w.]+) ?(.*)", part)
        if found:
            overrides = [word for word in shlex.split(found[2]) if re.match(r"[a-z_.]+=", word)]
            load(found[1], overrides)


def test_every_override_of_the_readme_is_a_key_that_takes_its_value() -> None:
    overrides = [
        word for part in _code("README.md") for word in re.findall(r"(?:^|(?<= ))[a-z_]+(?:\.[a-z_]+)+=[^ ]+", part)
    ]
    assert len(overrides) > 10
    for part in _code("README.md"):
        words = shlex.split(part) if re.match(r"[a-z_]+\.[a-z_.]+=", part) else []
        load("tiny_cpu", [*words, *(["model.num_layers=16"] if "pipeline" in part else [])])


def test_the_table_of_recipes_names_all_of_configs() -> None:
    section = re.search(r"## Recipes\n(.*?)\n## ", _text("README.md"), re.S)
    assert section
    named = {name for row in re.findall(r"^\|.*$", section[1], re.M) for name in re.findall(r"`([\w.]+)`", row)}
    assert named == {path.name.removesuffix(".yaml") for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", _text(page))
    for link in links:
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), f"{page}: links to {link}"
    for part in _code(page):
        for word in part.split():
            ours = re.fullmatch(r"[\w./-]+", word) and word.split("/")[0] in FOLDERS and "/" in word
            if ours and not NOT_OURS.match(word):
                assert (ROOT / word).exists(), f"{page}: names {word}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_alone_is_somewhere_in_the_repository(page: str) -> None:
    names = {path.name for folder in FOLDERS if not folder.startswith(".") for path in (ROOT / folder).rglob("*")}
    for part in _code(page):
        if re.fullmatch(r"[\w.]+\.(py|slurm|sh)", part):
            assert part in names, f"{page}: names {part}"


def test_slurm_s_commands_are_in_the_readme_word_for_word() -> None:
    for line in (
        "sbatch --nodes 4 compile.slurm ./llama_7b.sh",
        "sbatch --nodes 4 run.slurm ./llama_7b.sh",
        "tensorboard --logdir ./",
        "make demo",
        "make test",
    ):
        assert line in _code("README.md"), line


def test_functions_that_the_engine_s_page_points_to_are_there() -> None:
    sources = "\n".join(path.read_text() for package in ("llama", "launch") for path in (ROOT / package).rglob("*.py"))
    for name in ("reshard", "settle_gradients", "squared_norm", "SharedVocabulary", "TiedEnds", "SafeReader"):
        assert f"`{name}" in _text("docs/engine.md") and re.search(rf"(def|class) {name}\b", sources), name


def test_every_test_file_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest passes over some folder names by itself, `dist` among them: then nothing fails because nothing runs."""
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert not [f for f in folders for pattern in passed_over if fnmatch.fnmatch(f, pattern)]
