"""Token ids are those of an independent tokenizer; text comes back whole, at once or streamed."""

import functools
import itertools

import pytest
import tokenizers
from model_files import byte_alphabet

import tilewise.model
from tilewise.model import ModelError, Tokenizer
from tilewise.model.chat import render_chat
from tilewise.model.gguf_file import read_gguf
from tilewise.model.tokenizer import tokenizer_from_gguf

regex = pytest.importorskip("regex")

PAGE = """\
# A page of mixed text
It's 2024-06-30; they'll pay 1,234,567.89 for 3½ apples, I'VE heard. x² ≠ ½?

def fib(n: int) -> int:
\treturn n if n < 2 else fib(n - 1) + fib(n-2)   # trailing   spaces   \n\

    for (int i = 0; i < 10; ++i) { printf("%d\\n", a[i]); }
Ünïcödé naïve façade, Größe, Ελληνικά, русский язык, עברית, العربية, हिन्दी
日本語の文章と中文字符。한국어 문장。 ０１２３ ٣٤٥ Ⅻ ①
👋🏽 family: 👩‍👩‍👧‍👦 flag: 🇫🇷 keycap: 1️⃣ zalgo: z̸̢͖a\u0301
tabs:\t\t\tend\r\nnewlines:\n\n\n\nnbsp:\u00a0\u00a0em:\u2003zero:\u200bx
<|im_start|>user
special <|im_end|> and not special <|im_endx|>
https://example.com/a_b-c?q=%20&r=[1]#top  $$$ ... !!! -- -> => <= >=
"""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_pair_ids(text, metadata, split, whole_words=False):
    """GPT-2's algorithm as published: split, then merge the best-ranked pair until none is left.

    With `whole_words`, as in Llama 3, a word that is a token is not put together from merges.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    alphabet = byte_alphabet()

    @functools.cache
    def merge(word):
        parts = [alphabet[byte] for byte in word.encode()]
        if whole_words and "".join(parts) in ids:
            return [ids["".join(parts)]]
        while len(parts) > 1:
            pairs = itertools.pairwise(parts)
            best = min(pairs, key=lambda pair: ranks.get(pair, float("inf")))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return [ids[part] for part in parts]

    result = []
    for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if piece in special:
            result.append(ids[piece])
        else:
            result += [i for word in split(piece) for i in merge(word)]
    return result


def _split_smollm(text):
    """Digits apart from each other and from everything else, then GPT-2's words."""
    parts = regex.findall(r"\p{N}|\P{N}+", text)
    return [word for part in parts for word in regex.findall(_GPT2, part)]


@pytest.fixture(scope="module")
def metadata():
    return read_gguf(tilewise.model.find("smollm2")).metadata


@pytest.mark.model
def test_smollm2_ids_are_those_of_an_independent_tokenizer(metadata):
    ids = tokenizer_from_gguf(metadata).encode(PAGE)
    assert ids == _byte_pair_ids(PAGE, metadata, _split_smollm)
    assert len(ids) > 350


@pytest.mark.model
@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("gpt-2", lambda text: regex.findall(_GPT2, text)),
        ("llama-bpe", lambda text: regex.findall(_LLAMA3, text)),
        ("qwen2", lambda text: regex.findall(_LLAMA3.replace("{1,3}", ""), text)),
    ],
)
def test_other_splits(metadata, pre, split):
    changed = metadata | {"tokenizer.ggml.pre": pre}
    text = PAGE.replace("a\u0301", "á")  # Qwen2 composes characters first
    ids = tokenizer_from_gguf(changed).encode(text)
    assert ids == _byte_pair_ids(text, metadata, split, whole_words=pre == "llama-bpe")


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["1234", "a", "b"]),
        ("smollm", ["1", "2", "3", "4", "a", "b"]),
        ("qwen2", ["1", "2", "3", "4", "a", "b"]),
        ("llama-bpe", ["123", "4", "ab"]),  # "ab" is a token that no merge makes
    ],
)
def test_what_a_word_is(pre, words):
    tokens = ["1", "2", "3", "4", "a", "b", "12", "123", "1234", "ab"]
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": ["1 2", "12 3", "123 4"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    ids = tokenizer_from_gguf(metadata).encode("1234ab")
    assert [tokens[i] for i in ids] == words


@pytest.mark.model
def test_decoding_gives_the_text_back(metadata):
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode(PAGE)
    assert tokenizer.decode(ids, skip_special_tokens=False) == PAGE
    assert "<|im_end|>" not in tokenizer.decode(ids)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.token(tokenizer.bos_id) == "<|im_start|>"


@pytest.mark.model
def test_streamed_pieces_join_to_the_whole(metadata):
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode(PAGE)
    stream = tokenizer.stream(tokenizer.encode("before"))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "" in pieces  # some characters take more than one token


@pytest.mark.model
def test_a_stream_that_ends_within_a_character_shows_it(metadata):
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("ok 👋")[:-1]
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == "ok"
    assert stream.flush() == " \N{REPLACEMENT CHARACTER}"


# --- SentencePiece --------------------------------------------------------------------------------


def _sentencepiece_metadata():
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "bc", "▁abc", "ca", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _sentencepiece_ids(text, metadata):
    """SentencePiece's algorithm: merge the neighbours that make the piece with the best score."""
    tokens = metadata["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    parts = list(("▁" + text).replace(" ", "▁"))
    while True:
        found = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in score
        ]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = [1]
    for part in parts:
        names = [part] if part in score else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [tokens.index(name) for name in names]
    return ids


@pytest.mark.parametrize("text", ["abc", "a b cab", "  aabbcc  ", "abca.é👋 b", "ca ca"])
def test_sentencepiece_ids(text):
    metadata = _sentencepiece_metadata()
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode(text)
    assert ids == _sentencepiece_ids(text, metadata)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_a_sentencepiece_stream_keeps_the_space_after_its_context():
    tokenizer = tokenizer_from_gguf(_sentencepiece_metadata())
    context, ids = tokenizer.encode("abc"), tokenizer.encode(" abc é", add_special_tokens=False)
    stream = tokenizer.stream(context)
    # The prefix that encoding adds is a space like any other in the middle of a text.
    assert "".join(map(stream.push, ids)) + stream.flush() == "  abc é"


# --- what a file may lack -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: must be 'gpt2' or 'llama', got 'bert'"),
        ({"pre": "martian"}, "tokenizer.ggml.pre: must be one of .*, got 'martian'"),
        ({"tokens": None}, "tokenizer.ggml.tokens: must be a list, got NoneType"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens: the tokens are not all different"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: must have 2 entries, got 1"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges: every merge must be two tokens"),
        ({"merges": ["a x"]}, "tokenizer.ggml.merges: .*`x` out of vocabulary"),
        ({"eos_token_id": 2}, r"tokenizer.ggml.eos_token_id: must be in \[0, 2\), got 2"),
        ({"model": "llama"}, "tokenizer.ggml.scores: must have 2 entries, got 0"),
    ],
)
def test_a_bad_description_is_named(change, message):
    metadata = {"model": "gpt2", "tokens": ["a", "b"], "merges": []} | change
    with pytest.raises(ModelError, match=message):
        tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


# --- chat templates -------------------------------------------------------------------------------


def _byte_tokenizer():
    vocab = {token: i for i, token in enumerate(byte_alphabet())}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])), bos_id=1, eos_ids=[2])


def test_a_template_sees_messages_and_special_tokens():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}\n"
        "{{ m['content'] | tojson }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "<é>"}]
    tokenizer = _byte_tokenizer()
    assert render_chat(template, messages, tokenizer) == tokenizer.token(1) + '"<é>">'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'x' * messages }}",
    ],
)
def test_a_template_that_fails_or_misbehaves_is_one_error(template):
    with pytest.raises(ValueError, match="messages: the chat template failed: "):
        render_chat(template, [], _byte_tokenizer())
