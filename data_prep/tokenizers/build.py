"""tokenizer.json for models that came without one: SentencePiece BPE, and Llama-3's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from data_prep.tokenizers.sentencepiece_rules import BPE, Rules

if TYPE_CHECKING:
    import tokenizers as hf

VERSION = 1  # of what is built here: kept copies of another version are built again


def from_sentencepiece(
    path: Path, model: Any, rules: Rules, control: Mapping[str, int], bos: int | None = None
) -> hf.Tokenizer:
    """A SentencePieceProcessor as tokenizer.json; `control`: tokens it looks for; `bos`: put before each text.

    Raises UserError for models that are not BPE.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    if rules.model_type != BPE:
        raise UserError(f"{path}: only BPE models of SentencePiece can be a tokenizer.json")
    ids = range(model.get_piece_size())
    pieces = {model.id_to_piece(i): i for i in ids}
    scores = {
        model.id_to_piece(i): model.get_score(i)
        for i in ids
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda p: (-scores[p], pieces[p]))
        for cut in _cuts(piece, scores, pieces)
    ]
    built = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=merges,
            unk_token=model.id_to_piece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=any(model.is_byte(i) for i in ids),
        )
    )
    steps: list[Any] = [normalizers.Precompiled(rules.charsmap)] if rules.charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    # Prepend, not Metaspace: that one adds no space before text that begins with one, which SentencePiece does.
    steps += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    built.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []))
    built.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    if bos is not None:
        built.post_processor = _prefix(model.id_to_piece(bos), bos)
    return built


def _cuts(piece: str, scores: dict[str, float], pieces: dict[str, int]) -> list[int]:
    """Places where a piece is two pieces, the pair most likely to meet (lowest ids) first."""
    cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]
    return sorted(cuts, key=lambda cut: (pieces[piece[:cut]], pieces[piece[cut:]]))


def from_ranks(
    ranks: Mapping[bytes, int], split: str, control: Mapping[str, int], bos: str | None = None
) -> hf.Tokenizer:
    """Ranks of tiktoken as tokenizer.json: every way to split a token in two is a merge, in rank order."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    spell = _byte_spelling()
    spelled = {token: "".join(map(spell.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
        cuts.sort(key=lambda cut, t=token: (ranks[t[:cut]], ranks[t[cut:]]))  # type: ignore[misc]
        merges += [(spelled[token[:cut]], spelled[token[cut:]]) for cut in cuts]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    # ignore_merges: like tiktoken, a word that is a token is that token, whether or not merges lead there
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    if bos is not None:
        built.post_processor = _prefix(bos, control[bos])
    return built


def _byte_spelling() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level vocabularies (GPT-2's bytes_to_unicode)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte if byte in plain else 256 + others.index(byte)) for byte in range(256)}


def _prefix(token: str, number: int) -> Any:
    """Post-processor that puts one token before each text."""
    from tokenizers import processors

    return processors.TemplateProcessing(f"{token}:0 $A:0", f"{token}:0 $A:0 {token}:1 $B:1", [(token, number)])
