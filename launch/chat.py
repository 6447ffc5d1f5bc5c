"""`herd chat`: a quick talk with a model, through the chat template that it was trained with, answers appearing as they come."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.conversations import Message
    from data_prep.tokenizers import Tokenizer
    from llama.chat.template import ChatTemplate
    from llama.model.llama import Llama


@dataclass(frozen=True)
class Loaded:
    """A model that can be talked to."""

    model: Llama
    tokenizer: Tokenizer
    template: ChatTemplate
    stop: frozenset[int]
    """Ids that end a text, besides the template's end of a turn."""


@dataclass(frozen=True)
class Draw:
    """How tokens are chosen."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass
class Talk:
    """A conversation so far."""

    loaded: Loaded
    draw: Draw
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    written: int = 0
    """Tokens of the last answer."""
    ended: bool = False
    """Whether the last answer came to its end, or was cut by max_tokens or the model's context."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        from data_prep.conversations import Message

        self.messages = [Message("system", self.system)] if self.system else []

    def prompt(self) -> tuple[list[int], set[int]]:
        """Ids up to where the assistant's next turn begins, and those that end it.

        They are what training puts before an answer: a turn is rendered and encoded as there, and cut off again. So what
        a person types never becomes a control token. Raises UserError where the template refuses the conversation.
        """
        from data_prep.conversations import Conversation, Location, Message
        from llama.chat.encode import Encoder

        encoder = Encoder(self.loaded.tokenizer, self.loaded.template, "last", "error", 1 << 30)
        turns = (*self.messages, Message("assistant", "x"))
        example = encoder.whole([Conversation(turns, Location("chat"))])[0]
        if example is None:
            raise UserError(next(iter(encoder.counts)).removeprefix("refused: "), 2)
        ids = example.ids.tolist()
        last = ids[int(example.trained.nonzero()[0][-1])]
        end = {last} if last in self.loaded.tokenizer.control.values() else set()
        return ids[: int(example.trained.argmax())], end | self.loaded.stop

    def answer(self, question: str) -> Generator[str, None, None]:
        """The model's answer as it comes; both turns are then part of the conversation. Raises UserError."""
        from data_prep.conversations import Message
        from launch.generate import stream_text
        from llama.model.generate import generate

        self.messages.append(Message("user", question))
        before, text = len(self.messages), ""
        try:
            ids, stop = self.prompt()
            model, tokenizer = self.loaded.model, self.loaded.tokenizer
            if max(ids) >= model.config.vocab_size:
                raise UserError(
                    f"{tokenizer.path}: has more tokens than the model's {model.config.vocab_size}; is it another model's?"
                )
            room = model.config.max_position - len(ids)
            if room <= 0:
                raise UserError(
                    f"the conversation has {len(ids)} tokens and the model's context ends at {model.config.max_position}; "
                    "begin anew with /reset",
                    2,
                )
            d, self.written = self.draw, 0
            control = set(tokenizer.control.values())

            def known() -> Iterator[int]:
                for number in generate(model, ids, d.max_tokens, sorted(stop), d.temperature, d.top_p, d.seed + before):
                    self.written += 1
                    if number < tokenizer.vocab_size and number not in control:
                        yield number

            for part in stream_text(tokenizer.decode, ids, known()):
                text += part
                yield part
            self.ended = self.written < min(d.max_tokens, room)
        finally:
            if text:
                self.messages.append(Message("assistant", text))
            else:
                self.messages.pop()


def load(directory: Path, template: str | None, base: Path | None, device: str | None) -> Loaded:
    """A Hugging Face directory, a PEFT adapter over its base, or a run's newest checkpoint, ready to talk.

    Raises UserError when it is none of these, or has no tokenizer or chat template.
    """
    from data_prep.tokenizers import load_tokenizer
    from launch import generate
    from llama.chat.choose import OWN, load_template, own_template

    with tempfile.TemporaryDirectory(prefix="herd-chat-") as aside:
        if (directory / "recipe.yaml").is_file():
            from llama.recipe import load as load_recipe

            recipe = load_recipe(str(directory / "recipe.yaml"))
            if recipe.chat is not None:
                template = template or recipe.chat.template
            if recipe.lora.rank and base is None and recipe.train.init_from:
                base = Path(recipe.train.init_from)
            directory = _export(directory, Path(aside) / "exported")
        folder = directory if any(directory.glob("tokenizer.*")) or base is None else base
        if (directory / "adapter_config.json").is_file():
            base = base or _base_of(directory)
            folder = folder if any(folder.glob("tokenizer.*")) else base
            model = _with_adapter(base, directory, device)
        else:
            model = generate.load_model(directory, device)
        tokenizer = load_tokenizer(folder)
        if template is None and own_template(tokenizer.path.parent) is None:
            raise UserError(
                f"{folder}: has no chat template; name the one that it was trained with, such as --template alpaca; "
                "herd generate continues a text without one",
                2,
            )
        loaded = load_template(template or OWN, tokenizer)
        return Loaded(model, tokenizer, loaded, frozenset(generate.stop_ids(folder, tokenizer)))


def _export(run: Path, to: Path) -> Path:
    """A run's newest checkpoint as a directory."""
    from launch.export import command as export

    with contextlib.redirect_stdout(sys.stderr):
        export.main([str(run), "--to", str(to), "--no-mlflow"], standalone_mode=False)
    return to


def _base_of(adapter: Path) -> Path:
    """The base that an adapter names, if that is a folder here."""
    from llama.hf.config import read_json

    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise UserError(f"{adapter}: its base {named!r} is no folder here; give --base DIRECTORY", 2)
    return Path(named)


def _with_adapter(base: Path, adapter: Path, device: str | None) -> Llama:
    """The base with the adapter folded in, in memory."""
    from launch.generate import fill_model
    from launch.merge import recipe_of
    from llama import hf
    from llama.hf.merge import merged_reader
    from llama.hf.weights import DTYPES, find_tensors

    recipe, base = recipe_of(base, adapter)
    dtype = DTYPES[find_tensors(base)[hf.hf_name("embed.weight")].dtype]
    read = merged_reader(recipe, hf.checkpoint_reader(base, recipe.model), hf.adapter_reader(adapter, recipe))
    return fill_model(recipe.model, read, dtype, device)


@click.command(short_help="A quick talk with a model.")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("question", required=False)
@click.option("--system", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True,
    help="0 takes the likeliest token; above it, draws, the higher the wilder.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1), default=0.95, show_default=True,
    help="Draw among the likeliest tokens that hold this share of the probability.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--template", help="tokenizer, alpaca, chatml, llama3 …, or a .jinja file. [default: the model's own]")
@click.option(
    "--base", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of an adapter; the one it names."
)
@click.option("--device", help="Where to run: cpu, cuda or neuron; the accelerator if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer with its figures as a JSON object.")
def command(
    directory: Path, question: str | None, system: str | None, max_tokens: int, temperature: float, top_p: float,
    seed: int, template: str | None, base: Path | None, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Talk with the model in DIRECTORY: a Hugging Face directory, an adapter beside its base, or a run folder.

    With QUESTION, or with one on standard input, only its answer is printed. In a talk /reset begins anew, /quit ends,
    and Ctrl-C cuts an answer short.

    \b
    herd chat merged
    herd chat merged "What is the capital of France?" --temperature 0
    echo "Name three rivers." | herd chat runs/smollm2_chat
    """
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().rstrip("\n")
    if question is not None and not question.strip():
        raise UserError('the question is empty; herd chat DIRECTORY "question", or herd chat DIRECTORY for a talk', 2)
    if as_json and question is None:
        raise UserError("--json is for one question; give it", 2)
    talk = Talk(load(directory, template, base, device), Draw(max_tokens, temperature, top_p, seed), system)
    if question is None:
        converse(talk)
        return
    began, parts = time.monotonic(), []
    for part in talk.answer(question):
        parts.append(part)
        if not as_json:
            show(part)
    facts = {"answer": "".join(parts), "tokens": talk.written, "ended": talk.ended, "seconds": time.monotonic() - began}
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else "")


def converse(talk: Talk) -> None:
    """Turn by turn until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its editing)
    click.echo(f"{talk.loaded.template.name}; /reset begins anew, /quit ends", err=True)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if text in ("/quit", "/exit", "/q"):
            return
        if text == "/reset":
            talk.reset()
            continue
        if text.startswith("/"):
            click.echo(f"no {text.split()[0]} here: /reset, /quit", err=True)
            continue
        if not text:
            continue
        began = time.monotonic()
        answer = talk.answer(text)
        try:
            for part in answer:
                show(part)
        except KeyboardInterrupt:
            answer.close()  # what was said so far stays said
        except UserError as error:
            click.echo(f"herd: {error}", err=True)
            continue
        speed = talk.written / max(time.monotonic() - began, 1e-9)
        click.echo()
        click.secho(f"{talk.written} tokens, {speed:.1f} a second{'' if talk.ended else ', cut'}", dim=True, err=True)


def show(text: str) -> None:
    """Text of the model, which may not steer a terminal."""
    from launch.preview import VISIBLE

    sys.stdout.write(text.translate(VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()
