"""Generating text: chunked prefill, then one token at a time, on the paged cache.

Prompts of a batch are computed together, their tokens packed one sequence after the other without
padding; a sequence that ends gives its pages back and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from tilewise import checks
from tilewise.model.chat import render_chat
from tilewise.model.decode import MOST_STEPS, Sampler
from tilewise.model.gpt import GPT
from tilewise.model.prefill import MOST_TOKENS
from tilewise.model.session import Session
from tilewise.model.tokenizer import TextStream, Tokenizer
from tilewise.paged import kv_formats

__all__ = ["Generation", "LanguageModel", "Stream", "Timings"]

Prompt = str | Sequence[int]

_LONGEST_WAIT = 0.05
"""Seconds that text may be held up for several tokens to be computed at once."""


@dataclass
class Timings:
    """How long generating took, for all sequences of the batch together.

    Args:
        prompt_tokens, prompt_seconds: until the first token of every sequence was chosen.
        decode_tokens, decode_seconds: the tokens after those.
        decode_steps: how many times the model ran for them.
        first_token_seconds: from the call to the first token.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    first_token_seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return _ratio(self.prompt_tokens, self.prompt_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        return _ratio(self.decode_tokens, self.decode_seconds)

    @property
    def seconds_per_output_token(self) -> float:
        """Mean time of a decoding step: what a reader of one sequence waits for each token."""
        return _ratio(self.decode_seconds, self.decode_steps)


def _ratio(amount: float, per: float) -> float:
    return amount / per if per else 0.0


@dataclass
class Generation:
    """What a prompt was continued with.

    Args:
        text: the new text, without a stop string and without special tokens.
        token_ids: the new tokens, the one that ended the text among them.
        prompt_ids: the prompt's tokens.
        finish_reason: "stop" (an end token or a stop string), "length", or "" while running.
        timings: shared by the whole batch.
    """

    prompt_ids: list[int]
    timings: Timings
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass
class LanguageModel:
    """A model with all that it takes to talk to it.

    On a CPU it keeps the cache of the last call, up to 256 MB, and recordings of what was computed
    on it, which hold the activations of 512 tokens of a layer, for the next one. Calls may overlap,
    from several threads too; each has its own then.

    Args:
        gpt: maps token ids to logits.
        tokenizer: None if the checkpoint had none; prompts are token ids then.
        chat_template: Jinja source, or None.
        name: for tables and messages.
    """

    gpt: GPT
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str = ""
    _idle: list[Session] = field(default_factory=list, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_idle": []}  # a copy's recordings would be of this one's weights

    def generate(
        self, prompt: Prompt | Sequence[Prompt], max_new_tokens: int = 128, **options: Any
    ) -> Any:
        """Continue a prompt, or each of several.

        Args:
            prompt: text or token ids; or a list of texts or of lists of token ids.
            max_new_tokens: most tokens to add to each.
            options: temperature=0.0 (0 takes the most likely token), top_k=0, top_p=1.0, min_p=0.0,
                repetition_penalty=1.0, seed=0: as in `tilewise.sample`; the random numbers of the
                prompt at index i in the list are those of sample i.
                stop=(): strings that end the text, and are not part of it.
                ignore_eos=False: go on past the model's end tokens (to measure speed).
                chunk_size=512: most prompt tokens to compute at a time.
                cache_dtype=None: the model's dtype, or "int8", "fp8" or "int4" for a smaller cache.

        Returns:
            A `Generation`, or a list of them where the prompt was a list of prompts.

        Raises:
            ValueError: for a prompt that is empty or leaves no room for `max_new_tokens`.
        """
        if not isinstance(prompt, Sequence):
            raise TypeError(f"prompt: must be text or token ids, got {type(prompt).__name__}")
        is_batch = not isinstance(prompt, str) and any(not _is_token(item) for item in prompt)
        prompts = list(cast(Sequence[Prompt], prompt)) if is_batch else [cast(Prompt, prompt)]
        run = _Run(self, prompts, max_new_tokens, **options)
        for _ in run.steps():
            pass
        generations = [sequence.generation for sequence in run.sequences]
        return generations if is_batch else generations[0]

    def stream(self, prompt: Prompt, max_new_tokens: int = 128, **options: Any) -> Stream:
        """Continue a prompt and hand out the text as it comes; takes what `generate` takes."""
        return Stream(_Run(self, [prompt], max_new_tokens, **options))

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int = 512, **options: Any
    ) -> Generation:
        """Answer a conversation.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first.
            max_new_tokens, options: as in `generate`.

        Raises:
            ValueError: if the model has no chat template or no tokenizer, or the template fails.
        """
        return self.generate(self.chat_ids(messages), max_new_tokens, **options)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt that asks the model for the next message of a conversation."""
        tokenizer = self._tokenizer()
        if self.chat_template is None:
            raise ValueError(f"messages: {self.name or 'the model'} has no chat template")
        text = render_chat(self.chat_template, messages, tokenizer)
        return tokenizer.encode(text, add_special_tokens=False)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, checked to be in the vocabulary."""
        if isinstance(prompt, str):
            ids = self._tokenizer().encode(prompt)
        elif isinstance(prompt, Sequence):
            ids = list(prompt)
        else:
            raise TypeError(f"prompt: must be text or token ids, got {type(prompt).__name__}")
        if not ids:
            raise ValueError("prompt: must have at least one token")
        vocab_size = self.gpt.config.vocab_size
        for token in ids:
            if not (_is_token(token) and 0 <= token < vocab_size):
                raise ValueError(f"prompt: token ids must be in [0, {vocab_size}), got {token!r}")
        return ids

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"prompt: {self.name or 'the model'} has no tokenizer for text")
        return self.tokenizer


class Stream(Iterator[str]):
    """The pieces of a text as they are generated; `generation` holds all so far."""

    def __init__(self, run: _Run) -> None:
        self.generation = run.sequences[0].generation
        self._pieces = run.steps()

    def __next__(self) -> str:
        return next(piece for pieces in self._pieces if (piece := pieces[0]))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Sequence:
    """One prompt and what has been generated after it."""

    def __init__(self, index: int, generation: Generation, text: TextStream | None) -> None:
        self.index = index
        self.generation = generation
        self.cached = -1
        self._text = text
        self._held = ""

    @property
    def is_finished(self) -> bool:
        return self.generation.finish_reason != ""

    def push(self, token: int, limit: int, end_ids: Sequence[int], stop: Sequence[str]) -> str:
        """Take the next token; returns the text that can be shown now."""
        generation = self.generation
        generation.token_ids.append(token)
        if token in end_ids:
            generation.finish_reason = "stop"
        elif len(generation.token_ids) == limit:
            generation.finish_reason = "length"
        if self._text is None:
            return ""
        text = self._held + self._text.push(token)
        if generation.finish_reason:
            text += self._text.flush()
        # The earliest stop string ends the text; what may yet become one is held back.
        if found := [at for at in (text.find(string) for string in stop) if at >= 0]:
            generation.finish_reason = "stop"
            text = text[: min(found)]
        keep = 0 if generation.finish_reason else _unfinished(text, stop)
        text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        generation.text += text
        return text


def _unfinished(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop string begins."""
    longest = max((len(string) for string in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in stop):
            return size
    return 0


class _Run:
    """One call of `generate`: its sequences, their cache, and how to choose tokens."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        chunk_size: int = 512,
        cache_dtype: torch.dtype | str | None = None,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
            checks.is_integer(name, value)
            if value < 1:
                raise ValueError(f"{name}: must be >= 1, got {value}")
        self._started = time.perf_counter()
        self._model, self._limit, self._chunk_size = model, max_new_tokens, chunk_size
        self._sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        self._stop = [string for string in ([stop] if isinstance(stop, str) else stop) if string]
        for string in self._stop:
            if not isinstance(string, str):
                raise TypeError(f"stop: must be text or texts, got {type(string).__name__}")
        if self._stop and model.tokenizer is None:
            raise ValueError("stop: the model has no tokenizer, so there is no text to look at")
        self._end_ids = model.tokenizer.eos_ids if model.tokenizer and not ignore_eos else ()
        self._timings = Timings()
        self.sequences: list[_Sequence] = []
        config = model.gpt.config
        for prompt in prompts:
            ids = model.encode(prompt)
            if len(ids) + max_new_tokens > config.max_positions:
                raise ValueError(
                    f"max_new_tokens: the model has {config.max_positions} positions and the "
                    f"prompt {len(ids)} tokens, got {max_new_tokens}"
                )
            text = model.tokenizer.stream(ids) if model.tokenizer else None
            generation = Generation(ids, self._timings)
            self.sequences.append(_Sequence(len(self.sequences), generation, text))
        self._lengths = [len(s.generation.prompt_ids) + max_new_tokens for s in self.sequences]
        self._longest = max(self._lengths, default=0)
        self._cache_dtype = cache_dtype if cache_dtype is not None else model.gpt.dtype
        stored = kv_formats.stored_dtype(self._cache_dtype)  # refused now, and not in `steps`
        kv_formats.stored_width("head_dim", config.head_dim, stored)

    def steps(self) -> Iterator[list[str]]:
        """Run to the end; yields after each run of the model what text it added to each prompt."""
        self._session = _take_session(self._model, self._lengths, self._cache_dtype)
        self._cache = self._session.cache
        try:
            yield from self._steps()
        except GeneratorExit:  # who reads the text has enough of it
            for sequence in self.sequences:
                if sequence.cached >= 0 and not sequence.is_finished:
                    self._cache.free(sequence.cached)
            self._leave_session()
            raise
        self._leave_session()

    def _leave_session(self) -> None:
        if self._session.tidy():
            self._model._idle[:] = [self._session]

    def _steps(self) -> Iterator[list[str]]:
        timings = self._timings
        for chunks in self._prefill_chunks():
            pieces = self._prefill(chunks)
            timings.prompt_tokens += sum(len(ids) for _, ids in chunks)
            timings.prompt_seconds = time.perf_counter() - self._started
            if not timings.first_token_seconds and self.sequences[0].generation.token_ids:
                timings.first_token_seconds = timings.prompt_seconds
            yield pieces
        while running := [s for s in self.sequences if not s.is_finished]:
            started = time.perf_counter()
            pieces = [""] * len(self.sequences)
            steps = self._decode(running)
            for chosen in steps:
                going_on = [
                    (s, t) for s, t in zip(running, chosen, strict=True) if not s.is_finished
                ]
                self._push(going_on, pieces)
                timings.decode_tokens += len(going_on)
            timings.decode_seconds += time.perf_counter() - started
            timings.decode_steps += len(steps)
            yield pieces

    def _prefill_chunks(self) -> Iterator[list[tuple[_Sequence, list[int]]]]:
        """All prompts, cut so that no more than `chunk_size` tokens are computed at once."""
        chunks: list[tuple[_Sequence, list[int]]] = []
        room = self._chunk_size
        for sequence in self.sequences:
            sequence.cached = self._cache.add_sequence()
            ids = sequence.generation.prompt_ids
            while ids:
                chunks.append((sequence, ids[:room]))
                ids, room = ids[room:], room - len(ids[:room])
                if not room:
                    yield chunks
                    chunks, room = [], self._chunk_size
        if chunks:
            yield chunks

    @torch.no_grad()
    def _prefill(self, chunks: list[tuple[_Sequence, list[int]]]) -> list[str]:
        """Feed sequences parts of their prompts; where one is complete, take the first token."""
        most = min(self._chunk_size, MOST_TOKENS)
        prefill = self._session.prefill(len(chunks), most)
        logits = prefill([s.cached for s, _ in chunks], [ids for _, ids in chunks])
        complete = [
            row
            for row, (s, _) in enumerate(chunks)
            if self._cache.allocator.length(s.cached) >= len(s.generation.prompt_ids)
        ]
        if len(complete) < len(chunks):
            logits = logits[torch.tensor(complete, device=logits.device, dtype=torch.int64)]
        started = [chunks[row][0] for row in complete]
        chosen = self._choose(logits, started) if complete else []
        pieces = [""] * len(self.sequences)
        self._push(list(zip(started, chosen, strict=True)), pieces)
        return pieces

    def _push(self, chosen: list[tuple[_Sequence, int]], pieces: list[str]) -> None:
        """Add a token to each of some sequences, and its text to their pieces."""
        for sequence, token in chosen:
            pieces[sequence.index] += sequence.push(token, self._limit, self._end_ids, self._stop)
            if sequence.is_finished:
                self._cache.free(sequence.cached)

    def _decode(self, sequences: list[_Sequence]) -> list[list[int]]:
        """Feed each sequence its last token and take the next one, or several one after another.

        A sequence may be over before the last of them; what was chosen after its end is for nobody.
        """
        size = len(sequences)
        decoder, sampler = self._session.decoder(size, self._longest, self._sampling)
        _read(sampler, sequences)
        count = min(MOST_STEPS, *(self._limit - len(s.generation.token_ids) for s in sequences))
        seconds = self._timings.seconds_per_output_token
        if not seconds:
            count = 1  # which says how long one takes
        elif seconds * count > _LONGEST_WAIT:
            count = max(1, int(_LONGEST_WAIT / seconds))
        last = [s.generation.token_ids[-1] for s in sequences]
        chosen: list[list[int]] = decoder.steps([s.cached for s in sequences], last, count).tolist()
        return chosen

    def _choose(self, logits: torch.Tensor, sequences: list[_Sequence]) -> list[int]:
        """The first token of each sequence."""
        sampler = Sampler(len(sequences), self._longest, logits.device, self._sampling)
        _read(sampler, sequences)
        chosen: list[int] = sampler(logits).tolist()
        return chosen


def _take_session(
    model: LanguageModel, tokens: list[int], cache_dtype: torch.dtype | str
) -> Session:
    """The session that the last call has left, if it fits this one, or a new one.

    Where calls overlap, each has its own.
    """
    try:
        session = model._idle.pop()  # in one step: nobody else shall have it too
    except IndexError:
        session = None
    if session is None or not session.fits(model.gpt, tokens, cache_dtype):
        session = Session(model.gpt, tokens, cache_dtype)
    return session


def _read(sampler: Sampler, sequences: list[_Sequence]) -> None:
    texts = [(s.generation.prompt_ids, s.generation.token_ids) for s in sequences]
    sampler.read([s.index for s in sequences], texts)
