"""`herd export` and `herd generate`: from a run folder to text, as a person types it."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

from data_prep.tokenizers import Tokenizer, load_tokenizer
from launch import cli
from launch.generate import starts_with_bos, stream_text
from llama import hf, recipe
from llama.checkpoint_format import FORMAT
from llama.config import Model
from llama.model.llama import Llama
from llama.run_folder import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
VOCABULARY = 400
CONFIG = Model(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_position=256)
Herd = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model with bytes for what it cannot spell."""
    import io
    from pydoc_data.topics import topics

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).splitlines()[:2000]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def run(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 10 and 20, and a half-written one of step 30."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    keys = {
        "name": "tiny",
        "model": CONFIG.model_dump(),
        "data": {"seq_length": 16, "tokenizer": str(tokenizer)},
        "train": {"steps": 30, "global_batch_size": 1},
    }
    recipe.save(recipe.build(keys, "test"), folder / "recipe.yaml")
    for step in (10, 20, 30):
        torch.manual_seed(step)
        model = Llama(CONFIG)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
        torch.nn.init.zeros_(
            model.head.weight[:259]
        )  # random bytes are no text, and decode as nobody could stream them
        checkpoint = folder / f"checkpoints/step-{step:08}"
        dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=checkpoint, no_dist=True)
        if step < 30:
            files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
            sums = {name: (len(data), zlib.crc32(data)) for name, data in files.items()}
            (checkpoint / MANIFEST).write_text(json.dumps({"format": FORMAT, "state": {}, "model": {}, "files": sums}))
    return folder


@pytest.fixture
def herd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Herd:
    """Run the command; its exit code, output and error output."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["herd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out = capsys.readouterr()
        return int(stopped.value.code or 0), out.out, out.err

    return call


def test_the_newest_complete_checkpoint_is_exported(herd: Herd, run: Path, tmp_path: Path) -> None:
    code, out, _ = herd("export", run, "--to", tmp_path / "out")
    assert code == 0 and out.startswith("step-00000020 -> ") and "bfloat16" in out
    code, out, _ = herd("export", run, "--to", tmp_path / "old", "--step", 10, "--dtype", "float32")
    assert code == 0 and out.startswith("step-00000010 -> ")
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "old"))
    assert new["model.norm.weight"].dtype == torch.bfloat16 and old["model.norm.weight"].dtype == torch.float32
    assert not torch.equal(new["model.norm.weight"].float(), old["model.norm.weight"].bfloat16().float())


def test_the_best_checkpoint_is_the_one_that_the_newest_names(herd: Herd, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = folder / "checkpoints/step-00000020" / MANIFEST
    manifest = json.loads(newest.read_text())
    for state, code, said in (
        ({}, 2, "has not validated yet"),
        ({"best_step": 10, "best_loss": 1.5}, 0, "step-00000010 -> "),
        ({"best_step": 15, "best_loss": 1.5}, 2, "checkpoint.keep_best=true"),
    ):
        newest.write_text(json.dumps(manifest | {"state": state}))
        found, out, error = herd("export", folder, "--to", tmp_path / "out", "--step", "best")
        assert found == code and said in out + error and (out + error).count("\n") == 1
    code, _, error = herd("export", folder, "--to", tmp_path / "x", "--step", "bets")
    assert code == 2 and "bets" in error


def test_the_export_loads_in_transformers_with_its_tokenizer(
    herd: Herd, run: Path, tokenizer: Path, tmp_path: Path
) -> None:
    assert herd("export", run, "--to", tmp_path / "out", "--dtype", "float32")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(tokenizer)
    text = "The statement  is naïve 🦙."
    assert auto(text)["input_ids"] == ours.encode(text), "token files hold no BOS, so the export adds none"
    assert (model.config.bos_token_id, model.config.eos_token_id) == (ours.bos, ours.eod)
    assert model.generation_config.eos_token_id == ours.eod


def test_mistakes_of_export_are_one_line(herd: Herd, run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    for arguments, said in (
        ((run, "--step", 15), "there are 10, 20"),
        ((tmp_path,), "no complete checkpoint"),
        ((run / "checkpoints",), "no recipe.yaml"),
        ((run, "--tokenizer", tmp_path / "none"), "tokenizer"),
    ):
        code, _, error = herd("export", *arguments, "--to", tmp_path / "out")
        assert code == 2 and said in error and error.count("\n") == 1, error
    for more in ([], ["--overwrite"]):
        code, _, error = herd("export", run, "--to", tmp_path / "full", *more)
        assert code == 2 and "choose another folder" in error
    assert herd("export", run)[0] == 2 and herd("export", run, "--to", tmp_path / "x", "--dtype", "int8")[0] == 2


def test_a_damaged_checkpoint_is_not_exported(herd: Herd, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    file = next((folder / "checkpoints/step-00000020").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of a weight, which nothing but a checksum can see
    file.write_bytes(data)
    code, _, error = herd("export", folder, "--to", tmp_path / "out")
    assert code == 1 and "checksum" in error and "--step" in error and not (tmp_path / "out").exists()
    assert herd("export", folder, "--to", tmp_path / "out", "--step", 10)[0] == 0
    assert herd("export", folder, "--to", tmp_path / "unverified", "--no-verify")[0] == 0


@pytest.mark.parametrize("verb", ["export", "generate"])
def test_help_has_an_example(herd: Herd, verb: str) -> None:
    code, out, _ = herd(verb, "--help")
    assert code == 0 and f"  herd {verb} " in out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    keys = recipe.load(str(run / "recipe.yaml"))
    hf.export(run / "checkpoints/step-00000020", keys, folder, "float32", keys.data.tokenizer, add_bos=False)
    return folder


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers says, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = auto(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
    return str(load_tokenizer(folder).decode(made.tolist()))


def test_greedy_text_is_that_of_transformers(herd: Herd, exported: Path) -> None:
    code, out, _ = herd("generate", exported, "The statement is", "--max-tokens", 30, "--device", "cpu")
    assert code == 0 and out == continuation(exported, "The statement is", 30) + "\n"


def test_drawn_text_depends_on_the_seed_alone(herd: Herd, exported: Path) -> None:
    def draw(seed: int) -> str:
        return herd("generate", exported, "A", "--temperature", 1.0, "--top-p", 0.9, "--seed", seed)[1]

    assert draw(1) == draw(1) != draw(2)


def test_generation_ends_at_the_end_of_text(herd: Herd, exported: Path, tmp_path: Path) -> None:
    """With the first greedy token declared an end, only the prompt is left."""
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    model, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    first = int(model(torch.tensor([ours.encode("The")])).logits[0, -1].argmax())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCABULARY - 1, first]}))
    assert herd("generate", folder, "The")[1] == "The\n"


def test_mistakes_of_generate_are_one_line(herd: Herd, exported: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((exported, ""), "empty"),
        ((exported, "word " * 300), "ends at 256"),
        ((tmp_path, "x"), "tokenizer"),
        ((exported, "x", "--device", "abacus"), "abacus"),
    ):
        code, _, error = herd("generate", *arguments)
        assert code == 2 and said in error and error.count("\n") == 1, error


def test_a_prompt_begins_with_bos_where_the_tokenizer_says_so(tokenizer: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(tokenizer)
    assert starts_with_bos(tokenizer.parent, ours), "a lone tokenizer.model is Llama-2's convention"
    for add_bos in (True, False):
        ours.save_for_transformers(folder := tmp_path / str(add_bos), add_bos=add_bos)
        assert starts_with_bos(folder, load_tokenizer(folder)) == add_bos
        (folder / "tokenizer_config.json").unlink()  # then tokenizer.json's own rule counts
        assert starts_with_bos(folder, load_tokenizer(folder)) == add_bos


@pytest.fixture(params=["sentencepiece", "huggingface"])
def speller(request: pytest.FixtureRequest, tokenizer: Path, exported: Path) -> Tokenizer:
    loaded = load_tokenizer(tokenizer if request.param == "sentencepiece" else exported)
    assert loaded.kind == request.param
    return loaded


@pytest.mark.parametrize("text", [" plain words", " naïve 🦙🦙 日本語", "\n\n  x", "🦙", " a\n🦙\n b", " half"])
def test_streamed_text_never_shows_half_a_character(speller: Tokenizer, text: str) -> None:
    before = speller.encode("The statement")
    ids = speller.encode("The statement" + text)[len(before) :]
    assert speller.decode(before + ids) == "The statement" + text
    pieces = list(stream_text(speller.decode, before, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1 or len(text) < 6, "text must come as it is made"


def test_bytes_that_never_become_a_character_are_shown_at_the_end(speller: Tokenizer) -> None:
    before = speller.encode("The statement")
    half = speller.encode("The statement🦙")[len(before) :][:-1]
    assert set("".join(stream_text(speller.decode, before, half))) == {"\ufffd"}
