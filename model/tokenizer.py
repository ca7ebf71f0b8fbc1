"""Text to token ids and back, built with the `tokenizers` package from what a model file holds.

A GGUF file holds a vocabulary and the *name* of the rule by which text is split before merging;
the rules are those of the original tokenizers. A Hugging Face folder has all of it in
tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import ModelError

__all__ = ["TextStream", "Tokenizer", "tokenizer_from_gguf"]

# How text is split into words: by GPT-2's pattern (after taking digits apart, where "digits"), or
# by a pattern with at most so many digits to a word.
_GPT2_SPLIT = ("default", "gpt-2", "gpt2", "phi-2", "olmo", "jais", "mpt")
_GPT2_SPLIT_AND_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3_SPLIT = ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral")
_QWEN2_SPLIT = ("qwen2", "deepseek-r1-qwen", "megrez")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens in a GGUF file


class Tokenizer:
    """Encodes and decodes text.

    Args:
        backend: a `tokenizers.Tokenizer`.
        bos_id: the token that opens a text, if the model has one.
        eos_ids: the tokens that end one; the first is the end-of-sequence token proper.
    """

    def __init__(self, backend: Any, *, bos_id: int | None, eos_ids: Sequence[int]) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, in which special tokens are recognised.

        Args:
            text: any text.
            add_special_tokens: whether to put in front what the model wants there (most often
                nothing, or the bos token). A rendered chat template has it already.

        Raises:
            ValueError: for half a surrogate pair, as what is not UTF-8 is often read.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wrong = text[error.start]
            raise ValueError(
                f"text: must be valid Unicode, got {wrong!r} at {error.start}"
            ) from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int | None) -> str:
        """How the vocabulary spells one token; nothing for None."""
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Decode token by token what follows `context`."""
        return TextStream(self, context)


class TextStream:
    """Decodes tokens as they come, holding back a character whose bytes are not all there yet.

    The pieces joined are the decoded whole. Only the last few tokens are decoded again each time.
    """

    _CONTEXT = 4  # tokens before the first that can change how it is spelled (a leading space)

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-self._CONTEXT :])
        self._start = 0
        self._told = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that is certain with one more token; may be empty."""
        self._ids.append(token_id)
        piece = self._untold()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        if piece:
            self._start, self._told = self._told, len(self._ids)
        return piece

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        piece = self._untold()
        self._start, self._told = self._told, len(self._ids)
        return piece

    def _untold(self) -> str:
        told = self._tokenizer.decode(self._ids[self._start : self._told])
        return self._tokenizer.decode(self._ids[self._start :])[len(told) :]


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        ModelError: if the description is missing, damaged, or of a kind that is not supported.
    """
    from tokenizers import AddedToken, processors

    tokens = _field(metadata, "tokens", list)
    if len(set(tokens)) != len(tokens):
        raise ModelError("tokenizer.ggml.tokens: the tokens are not all different")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(
            f"tokenizer.ggml.token_type: must have {len(tokens)} entries, got {len(types)}"
        )
    special = {
        name: _special_id(metadata, name, len(tokens))
        for name in ("bos", "eos", "eot", "eom", "unknown")
    }

    kind = _field(metadata, "model", str)
    if kind == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre", "default")
        backend = _byte_level_bpe(tokens, _field(metadata, "merges", list), pre)
    elif kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores", ())
        if len(scores) != len(tokens):
            raise ModelError(
                f"tokenizer.ggml.scores: must have {len(tokens)} entries, got {len(scores)}"
            )
        pieces = {
            token: float(score)
            for token, score, kind in zip(tokens, scores, types, strict=True)
            if kind == _NORMAL
        }
        backend = _sentencepiece_bpe(
            tokens,
            pieces,
            unknown=tokens[special["unknown"] or 0],
            space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        )
    else:
        raise ModelError(f"tokenizer.ggml.model: must be 'gpt2' or 'llama', got {kind!r}")

    kinds = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(token, special=kinds[kind], normalized=False)
            for token, kind in zip(tokens, map(int, types), strict=True)
            if kind in kinds and token
        ]
    )
    bos = special["bos"]
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if add_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    eos_ids = [special[name] for name in ("eos", "eot", "eom")]
    return Tokenizer(
        backend, bos_id=bos, eos_ids=list(dict.fromkeys(i for i in eos_ids if i is not None))
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if any(merge.count(" ") != 1 for merge in merges):
        raise ModelError("tokenizer.ggml.merges: every merge must be two tokens")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab, pairs, ignore_merges=pre in _LLAMA3_SPLIT)
    except Exception as error:  # the package raises nothing narrower
        raise ModelError(f"tokenizer.ggml.merges: {error}") from error
    backend = Tokenizer(bpe)
    byte_level = pre_tokenizers.ByteLevel
    if pre in _GPT2_SPLIT:
        backend.pre_tokenizer = byte_level(add_prefix_space=False)
    elif pre in _GPT2_SPLIT_AND_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        )
    elif pre in _LLAMA3_SPLIT or pre in _QWEN2_SPLIT:
        pattern = _LLAMA3_PATTERN if pre in _LLAMA3_SPLIT else _QWEN2_PATTERN
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, byte_level(add_prefix_space=False, use_regex=False)]
        )
        if pre in _QWEN2_SPLIT:
            backend.normalizer = normalizers.NFC()
    else:
        known = sorted({*_GPT2_SPLIT, *_GPT2_SPLIT_AND_DIGITS, *_LLAMA3_SPLIT, *_QWEN2_SPLIT})
        raise ModelError(f"tokenizer.ggml.pre: must be one of {', '.join(known)}, got {pre!r}")
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    tokens: list[str],
    pieces: Mapping[str, float],
    *,
    unknown: str,
    space_prefix: bool,
) -> Any:
    """SentencePiece's BPE: the scores of the pieces say which neighbours merge first.

    Every way to split a piece into two others is a merge; a better score merges earlier.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    splits = [
        (-score, vocab[piece[:at]], vocab[piece[at:]])
        for piece, score in pieces.items()
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(splits)]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _field(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        raise ModelError(
            f"tokenizer.ggml.{name}: must be a {kind.__name__}, got {type(value).__name__}"
        )
    return value


def _special_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and not (isinstance(value, int) and 0 <= value < count):
        raise ModelError(f"tokenizer.ggml.{name}_token_id: must be in [0, {count}), got {value}")
    return value
