"""The model card of an export: README.md with the front matter that the Hugging Face Hub knows, written from a run's records.

Keys: https://huggingface.co/docs/hub/model-cards. A card that a person wrote or changed is never replaced: ours ends in a
checksum of itself.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from llama import recipe as recipes
from llama.config import Recipe
from llama.config.data import Source
from llama.run_folder import MANIFEST, RunFolder, read_json

Kind = Literal["model", "adapter", "merged"]
CARD = "README.md"
_SEAL = "\n<!-- herd {} -->\n"
PACKAGES = ("torch", "torch-neuronx", "transformers", "tokenizers")


def write_card(folder: Path, text: str, earlier: Path) -> None:
    """README.md in `folder`; the one of `earlier`, which the folder will replace, where a person had a hand in it."""
    old = earlier / CARD
    data = (text + _SEAL.format(_digest(text))).encode()
    if old.is_file() and not is_ours(old.read_text(encoding="utf-8", errors="replace")):
        data = old.read_bytes()
    with (folder / CARD).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def is_ours(text: str) -> bool:
    """Whether a card is as herd wrote it."""
    body, _, seal = text.rpartition("\n<!-- herd ")
    return bool(seal) and seal.partition(" ")[0] == _digest(body)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(recipe: Recipe, kind: Kind, checkpoint: Path | None, base: Path | None = None, said: str = "") -> str:
    """The card of a model, adapter or merged model.

    Args:
        checkpoint: RUN/checkpoints/step-N, whose run's records are told; None where no run is known.
        base: directory of the weights that the run started from; train.init_from when not given.
        said: what an adapter's own card says of its training, where its run is not known.
    """
    base = base or (Path(recipe.train.init_from) if recipe.train.init_from else None)
    run = None if checkpoint is None else RunFolder(checkpoint.parent.parent)
    step = None if checkpoint is None else read_json(checkpoint / MANIFEST).get("state", {}).get("step")
    parts = ["---\n" + yaml.safe_dump(front_matter(recipe, kind, base), sort_keys=False, allow_unicode=True) + "---"]
    parts += [
        f"# {_title(recipe, base)}",
        _sentence(recipe, kind, base),
        "## How to load it",
        _loading(recipe, kind, base),
    ]
    if run is None:
        parts += [said] if said else []
    else:
        assert checkpoint is not None
        parts += training(recipe, run, checkpoint, step)
    return "\n\n".join(parts) + "\n"


def front_matter(recipe: Recipe, kind: Kind, base: Path | None) -> dict[str, Any]:
    """What the Hub reads. The license is the base's where its card tells it, else left to who publishes."""
    keys: dict[str, Any] = {}
    if base is not None:
        theirs = front_matter_of(base)
        keys |= {key: theirs[key] for key in ("license", "license_name", "license_link", "language") if key in theirs}
        keys |= {"base_model": hub_name(base), "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    tags = ["herd", recipe.model.family]
    tags += [word for word, there in (("lora", recipe.lora.rank), ("dora", recipe.lora.dora)) if there]
    tags += ["qlora"] if recipe.lora.quantize else []
    tags += ["sft", "conversational"] if recipe.chat is not None else []
    library = "peft" if kind == "adapter" else "transformers"
    return keys | {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}


def front_matter_of(folder: Path) -> dict[str, Any]:
    """The front matter of a directory's card; empty where there is none that can be read."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def hub_name(folder: Path) -> str:
    """org/name for a folder in the Hub's cache, else the folder's own name: a path would name nothing on the Hub."""
    for part in reversed(folder.absolute().parts):
        if found := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{found[1]}/{found[2]}"
    return folder.absolute().name


def training_of(card: Path) -> str:
    """What a card of ours says from "## Training" on; empty where there is none."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    body = text.rpartition("\n<!-- herd ")[0]
    return "## Training" + body.partition("\n## Training")[2].rstrip() if "\n## Training" in body else ""


def _title(recipe: Recipe, base: Path | None) -> str:
    return recipe.name if recipe.name != "merge" or base is None else f"{hub_name(base)}, fine-tuned"


def _sentence(recipe: Recipe, kind: Kind, base: Path | None) -> str:
    way = "trained from random weights" if base is None else f"{hub_name(base).rpartition('/')[2]}, trained further"
    if recipe.lora.rank:
        assert base is not None
        what = "DoRA" if recipe.lora.dora else "LoRA"
        held = f" on a base in {recipe.lora.quantize}" if recipe.lora.quantize else ""
        name = hub_name(base)
        way = (
            f"{what} adapter for {name}, trained{held}"
            if kind == "adapter"
            else f"{name} with a {what} adapter folded in"
        )
    about = " on conversations" if recipe.chat is not None else ""
    return f"{way[0].upper()}{way[1:]}{about}."


def _loading(recipe: Recipe, kind: Kind, base: Path | None) -> str:
    if kind == "adapter":
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{hub_name(base) if base else "BASE"}")',
            'model = PeftModel.from_pretrained(base, "DIRECTORY")',
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
        ]
    lines += ['tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")']
    if recipe.chat is not None and recipe.chat.template == "tokenizer":
        lines += [
            'turns = [{"role": "user", "content": "Name three rivers."}]',
            'ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))",
        ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if recipe.chat is None:
        return text
    flag = "" if recipe.chat.template == "tokenizer" else f" --template {recipe.chat.template}"
    return f"{text}\n\nOr `herd chat DIRECTORY{flag}`."


def training(recipe: Recipe, run: RunFolder, checkpoint: Path, step: int | None) -> list[str]:
    """Training, data, figures, versions and the recipe, from a run's records."""
    events = list(run.history())
    state = read_json(checkpoint / MANIFEST).get("state", {})
    start: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "start"), {})
    samples = state.get("consumed_samples", 0)
    o, s, t = recipe.optimizer, recipe.schedule, recipe.train
    rows: list[tuple[str, str | None]] = [
        ("step", f"{step:,} of {t.steps:,}" if step is not None else None),
        ("tokens read", f"{samples * recipe.data.seq_length:,}" if samples else None),
        ("tokens with a label", f"{state['trained_tokens']:,}" if state.get("trained_tokens") else None),
        ("batch", f"{t.global_batch_size} × {recipe.data.seq_length:,} tokens"),
        ("learning rate", f"{o.lr:g}, {s.kind}, {s.warmup_steps} steps of warm-up, down to {s.min_lr:g}"),
        (
            "optimizer",
            f"AdamW, betas {o.betas[0]:g} and {o.betas[1]:g}, decay {o.weight_decay:g}, clipped at {o.clip_norm}",
        ),
        ("precision", t.precision),
        ("adapter", _adapter(recipe) if recipe.lora.rank else None),
        ("frozen", ", ".join(t.freeze) or None),
        ("loss on", None if recipe.chat is None else f"{recipe.chat.loss} of the assistant's turns"),
        ("chat template", None if recipe.chat is None else recipe.chat.template),
        ("layout", f"{start['layout']}: {start['ranks']} × {start['device']}" if start else None),
    ]
    parts = ["## Training", _table(("", ""), [(name, value) for name, value in rows if value is not None])]
    parts += ["### Data", _data(recipe)]
    figures = _figures([event for event in events if event["event"] == "validation"], step)
    parts += ["### Validation", figures] if figures else []
    parts += ["### Versions", _versions(run, start)]
    text = recipes.dump(recipe).rstrip()
    return [*parts, f"### Recipe\n\n<details><summary>{recipe.name}</summary>\n\n```yaml\n{text}\n```\n\n</details>"]


def _adapter(recipe: Recipe) -> str:
    lora = recipe.lora
    held = f"; base in {lora.quantize}{' with double quantisation' * (lora.quantize == 'nf4' and lora.double_quantization)}"
    kind = "DoRA" if lora.dora else "LoRA"
    return (
        f"{kind}, r {lora.rank}, alpha {lora.alpha:g}{' (rsLoRA)' * lora.rslora}, dropout {lora.dropout:g}, "
        f"on {', '.join(lora.targets)}{held * (lora.quantize is not None)}"
    )


def _data(recipe: Recipe) -> str:
    whole = sum(source.weight or 0 for source in recipe.data.train)
    rows = [(Path(source.path).name, _share(source, whole, recipe)) for source in recipe.data.train]
    told = _table(("source", "share"), rows)
    held_out = ", ".join(Path(source.path).name for source in recipe.data.validation)
    return f"{told}\n\nHeld out: {held_out or f'a part of these (split {recipe.data.split})'}."


def _share(source: Source, whole: float, recipe: Recipe) -> str:
    if source.tokens is not None:
        return f"{source.tokens:,} tokens"
    if source.epochs is not None:
        return f"{source.epochs:g} epochs"
    if recipe.chat is not None and len(recipe.data.train) > 1:
        return "all of it"  # conversations take no weights
    rest = any(other.weight is None for other in recipe.data.train)
    return f"{(source.weight or 0) / whole:.1%}{' of what the others leave' * rest}"


def _figures(validations: Sequence[Mapping[str, Any]], step: int | None) -> str:
    """The validation of the exported step, or the last before it, and the best one, with each source's."""
    known = [v for v in validations if isinstance(v.get("loss"), float) and math.isfinite(v["loss"])]
    by_step = {v["step"]: v for v in known}  # a step done again counts as done last
    until = [s for s in by_step if step is None or s <= step]
    if not until:
        return ""
    best = min(by_step, key=lambda s: float(by_step[s]["loss"]))
    rows: list[tuple[str, ...]] = []
    for name, at in (("here", max(until)), ("best", best)):
        for source, figures in [("all", by_step[at]), *(by_step[at].get("sources") or {}).items()]:
            accuracy = figures.get("accuracy")
            told = f"{figures['loss']:.4f}", f"{math.exp(min(figures['loss'], 700)):.3f}"
            rows.append((f"{name}, step {at:,}", source, *told, "–" if accuracy is None else f"{accuracy:.1%}"))
    return _table(("", "source", "loss", "perplexity", "accuracy"), rows)


def _versions(run: RunFolder, start: Mapping[str, Any]) -> str:
    """Of what the newest attempt ran on."""
    facts = read_json(run.path / "environment.json")
    packages = facts.get("packages", {})
    found = [f"herd {start['version']}"] if start.get("version") else []
    found += [f"{name} {packages[name]}" for name in PACKAGES if name in packages]
    found += [f"Python {facts['python'].split()[0]}"] if facts.get("python") else []
    day = f"; {datetime.fromisoformat(start['time']):%Y-%m-%d}" if start.get("time") else ""
    return f"{', '.join(found)}{day}."


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
