"""Recipes as files: find, inherit (`base:`), override (`a.b=c`), explain what is wrong, write back."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError
from llama import capabilities
from llama.config import Recipe
from llama.layout import Layout, layout

if TYPE_CHECKING:  # it loads torch, and a recipe is refused faster without
    from llama.device import Device

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML drops in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float)):
                problem = f"a key must be a plain word, found a {type(key).__name__}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def find(name: str) -> Path:
    """The recipe's file: a path, or a name in configs/ with or without .yaml."""
    given = Path(name)
    places = [given, CONFIGS / given, CONFIGS / f"{name}.yaml"]
    for place in places:
        if place.is_file():
            return place
    known = sorted(path.name.removesuffix(".yaml") for path in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(given.name.removesuffix(".yaml"), known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"configs/ has {', '.join(known)}"
    raise UserError(f"no recipe {name!r}: neither a file nor a name in configs/; {hint}", 2)


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One recipe's keys, laid over those of its base."""
    if path.resolve() in below:
        raise UserError(f"{path}: base: leads back to this file; remove one of the links", 2)
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}", 2) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        problem = problem or " ".join(str(error).split())  # a character that YAML forbids is told on two lines
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {problem}", 2) from error
    if not isinstance(keys, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys such as model: and train:, found {type(keys).__name__}", 2
        )
    base = keys.pop("base", None)
    if base is None:
        return keys
    parent = path.parent / str(base)
    try:
        parent = parent if parent.is_file() else find(str(base))
    except UserError as error:
        raise UserError(f"{path}: base: {error}", 2) from None
    return merge(_read(parent, (*below, path.resolve())), keys)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`: mappings key by key, everything else replaced.

    How long a run is can be said in steps or in epochs: where `change` says one of them, the other is no longer said.
    """
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    for said, other in (("steps", "epochs"), ("epochs", "steps")):
        if change.get(said) is not None and other not in change:
            merged.pop(other, None)
    return merged


def _override(keys: dict[str, Any], text: str) -> dict[str, Any]:
    dotted, equals, value = text.partition("=")
    if not equals or not all(dotted.split(".")):
        raise UserError(f"override {text!r} is not key=value, such as train.steps=100", 2)
    try:
        change: Any = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not valid YAML", 2) from error
    for part in reversed(dotted.split(".")):
        change = {part: change}
    return merge(keys, change)


def _known_keys(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    """The keys that the section at `path` knows."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = (
            [a for a in _types(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)] if field else []
        )
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[Any]:
    args = getattr(annotation, "__args__", ())
    return [annotation] + [t for arg in args for t in _types(arg)]


def _explain(error: ValidationError, where: str) -> str:
    """Pydantic's findings, each in one clause with a near key where one is likely."""
    clauses = []
    for item in error.errors():
        path = item["loc"]
        dotted = ".".join(str(part) for part in path)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), known := _known_keys(Recipe, path[:-1]), 1, 0.5)
            clauses.append(
                f"{dotted}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
            )
        elif item["type"] == "missing":
            clauses.append(f"{dotted}: missing; a recipe must give it")
        elif item["type"] == "value_error":
            clauses.append((f"{dotted}: " if dotted else "") + str(item["ctx"]["error"]))
        else:
            clauses.append(f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return f"{where}: " + "; also ".join(clauses)


def build(keys: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from its keys; `where` names them in an error.

    Raises UserError naming each wrong key and the remedy.
    """
    try:
        return Recipe.model_validate(keys)
    except ValidationError as error:
        raise UserError(_explain(error, where), 2) from None


def load(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe called `name` (a path or a name in configs/) with `a.b=c` overrides.

    Raises UserError (exit code 2) for a missing file, bad YAML, unknown keys or values that do not fit.
    """
    path = find(name)
    keys = _read(path)
    for text in overrides:
        keys = _override(keys, text)
    return build(keys, str(path))


def lay_out(recipe: Recipe, world_size: int) -> Layout:
    """llama.layout.layout, with a misfit as a UserError."""
    try:
        return layout(recipe, world_size)
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}: {error}", 2) from None


def check_device(recipe: Recipe, device: Device) -> list[str]:
    """Refuse what `device` cannot do, with what works; what is merely doubtful, in words. Raises UserError."""
    kind = capabilities.kind(device.type)
    able = replace(capabilities.TABLE[kind], pipeline=device.pipeline, zero_bubble=device.zero_bubble)
    return capabilities.check(recipe, kind, able)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key given; itself a valid recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(dump(recipe))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
