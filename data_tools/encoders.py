"""Which library turns texts into token ids? Both give the same ids, or the job stops.

`tokenizers` is the definition. gigatoken is some thirty times as fast on the tokenizers it knows; it is compared with
the definition on the first documents and on one in a thousand all along.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_tools.documents import Document
from data_tools.shard_writer import TokenizedDocuments
from data_tools.source_record import TokenizeSettings
from nemotron_train.data.fim import TextCutter
from nemotron_train.data.permutation import splitmix64
from nemotron_train.errors import ConfigError, DataError

ENGINES = ("auto", "gigatoken", "tokenizers")
COMPARED_ONE_IN = 1000
COMPARED_AT_FIRST = 20  # documents of a process
COMPARED_PIECES = 32  # of one batch at most, where documents are so long that they are encoded in pieces
ENCODED_CHARACTERS = 1 << 18  # at once by `tokenizers`, which holds some hundred bytes for each
LONGEST_PIECE = 1 << 20  # characters of a text that are encoded as one
# Where longer texts are cut: after a line end, or before a space and a word, no other space beside. There the usual
# tokenizers end a word or sign and begin the next, so that the ids are those of the whole text.
_SEAM = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \w)")
SEAM_CHARACTERS = 1 << 12  # looked through for one, before a text is cut anywhere


class TokenizersEncoder:
    """Hugging Face's library."""

    def __init__(self, tokenizer: Path, *, parse_special_tokens: bool) -> None:
        self._tokenizer = load_tokenizer(tokenizer)
        self._tokenizer.encode_special_tokens = not parse_special_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the ids of all texts, one after the other, and how many each has."""
        ids: list[NDArray[np.int64]] = []
        for group in _groups(texts, ENCODED_CHARACTERS):
            encodings = self._tokenizer.encode_batch_fast(group, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return np.concatenate([np.zeros(0, np.int64), *ids]), np.array([len(text) for text in ids], dtype=np.int64)


class GigatokenEncoder:
    """gigatoken, compared with Hugging Face's library now and then."""

    def __init__(self, tokenizer: Path, *, parse_special_tokens: bool) -> None:
        import gigatoken  # optional, and slow to import

        content = json.loads(tokenizer.read_bytes())
        if not parse_special_tokens:
            # It takes every token that is named there for what it spells; `tokenizers` only those that are not special.
            content["added_tokens"] = [token for token in content.get("added_tokens", ()) if not token.get("special")]
        content["truncation"] = content["padding"] = None
        self._tokenizer: Any = gigatoken.Tokenizer.from_json(json.dumps(content))
        self._definition = TokenizersEncoder(tokenizer, parse_special_tokens=parse_special_tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # One thread: the processes are the parallelism.
        encoded = self._tokenizer.encode_batch(list(texts), parallel=False)
        offsets = np.asarray(encoded.layout.offsets.data, dtype=np.int64)
        ids = np.asarray(encoded.layout.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)

    def differing(self, texts: Sequence[str]) -> int | None:
        """Return the first of the texts whose ids are not those of Hugging Face's library."""
        found, expected = self(texts), self._definition(texts)
        if np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0]):
            return None
        ours, theirs = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (found, expected))
        return next(number for number in range(len(texts)) if not np.array_equal(ours[number], theirs[number]))


class DocumentEncoder:
    """Turns documents into token ids, each ended by the end-of-document token; empty ones are left out."""

    def __init__(self, settings: TokenizeSettings) -> None:
        """Raises:
        ConfigError: the tokenizer lacks a token that is asked for, or cannot be used with the engine asked for.
        """
        path, special = settings.tokenizer, settings.parse_special_tokens
        self.eod_id = special_token_id(path, settings.eod_token, "--eod-token")
        names = zip(("prefix", "suffix", "middle"), settings.fim_tokens, strict=False)
        self._sentinels = {name: special_token_id(path, token, "--fim-tokens") for name, token in names}
        self._cutter = TextCutter(settings.fim_rate, settings.fim_spm_rate, settings.seed)
        self._engine: TokenizersEncoder | GigatokenEncoder
        self._engine, self.engine_text = choose_engine(path, settings.engine, parse_special_tokens=special)
        self._seen = 0

    def __call__(self, documents: Sequence[Document], key: int) -> TokenizedDocuments:
        """Encode documents.

        Args:
            key: decides, with a document's place in the sequence, which documents are compared, and how they are cut.
        """
        pieces: list[tuple[str | None, str]] = []
        counts = np.ones(len(documents), dtype=np.int64)  # pieces of each document
        for number, document in enumerate(documents):
            cut = self._cutter.cut(document.text, key + number) if self._cutter.rate else [(None, document.text)]
            if len(document.text) > LONGEST_PIECE:
                cut = [(name if first else None, part) for name, text in cut for first, part in _short_pieces(text)]
            counts[number] = len(cut)
            pieces += cut
        texts = [text for _, text in pieces]
        if isinstance(self._engine, GigatokenEncoder):
            self._compare(self._engine, documents, texts, np.repeat(np.arange(len(documents)), counts), key)
        ids, lengths = self._engine(texts)
        return self._join(ids, lengths, [name for name, _ in pieces], counts)

    def _join(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], sentinels: list[str | None], counts: NDArray[np.int64]
    ) -> TokenizedDocuments:
        """Put sentinels before pieces and ends after documents; leave out documents without a token."""
        firsts = np.cumsum(counts) - counts
        has_sentinel = np.array([name is not None for name in sentinels])
        text_tokens = np.add.reduceat(lengths, firsts)
        is_last = np.zeros(len(lengths), dtype=bool)
        is_last[firsts + counts - 1] = text_tokens > 0
        widths = lengths + has_sentinel + is_last
        ends = np.cumsum(widths)
        tokens = np.empty(int(ends[-1]), dtype=np.int32)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[ends[is_last] - 1] = False
        is_text[(ends - widths)[has_sentinel]] = False
        tokens[is_text] = ids
        tokens[ends[is_last] - 1] = self.eod_id
        tokens[(ends - widths)[has_sentinel]] = [self._sentinels[name] for name in sentinels if name is not None]
        by_document = np.add.reduceat(widths, firsts)
        return TokenizedDocuments(tokens, by_document[by_document > 0])

    def _compare(
        self,
        engine: GigatokenEncoder,
        documents: Sequence[Document],
        texts: Sequence[str],
        document_of: NDArray[np.int64],
        key: int,
    ) -> None:
        chosen = [
            number
            for number in range(len(documents))
            if self._seen + number < COMPARED_AT_FIRST or splitmix64(key + number) % COMPARED_ONE_IN == 0
        ]
        self._seen += len(documents)
        pieces = np.flatnonzero(np.isin(document_of, chosen))[:COMPARED_PIECES].tolist()
        wrong = engine.differing([texts[piece] for piece in pieces]) if pieces else None
        if wrong is not None:
            raise DataError(
                f"{documents[document_of[pieces[wrong]]].place}: gigatoken gives other token ids than tokenizers for "
                "this document. Use --engine tokenizers."
            )


def _short_pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Cut a text into pieces of up to LONGEST_PIECE characters, and say which is the first."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        most = start + LONGEST_PIECE
        end = max((seam.start() for seam in _SEAM.finditer(text, most - SEAM_CHARACTERS, most)), default=most)
        yield start == 0, text[start:end]
        start = end
    yield start == 0, text[start:]


def _groups(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    """Yield successive texts that have about so many characters together."""
    group: list[str] = []
    held = 0
    for text in texts:
        group.append(text)
        held += len(text)
        if held >= characters:
            yield group
            group, held = [], 0
    if group:
        yield group


def choose_engine(
    tokenizer: Path, engine: str, *, parse_special_tokens: bool
) -> tuple[TokenizersEncoder | GigatokenEncoder, str]:
    """Return the encoder, and what it is and why, for the log."""
    definition = TokenizersEncoder(tokenizer, parse_special_tokens=parse_special_tokens)
    if engine == "tokenizers":
        return definition, "tokenizers"
    if importlib.util.find_spec("gigatoken") is None:
        if engine == "gigatoken":
            raise ConfigError('--engine gigatoken: it is not installed (pip install "nemotron-train[tokenize]").')
        return definition, "tokenizers (gigatoken is not installed)"
    try:
        fast = GigatokenEncoder(tokenizer, parse_special_tokens=parse_special_tokens)
    except Exception as error:  # its loader raises nothing narrower
        reason = str(error).splitlines()[0]
        if engine == "gigatoken":
            raise ConfigError(f"--engine gigatoken cannot use {tokenizer}: {reason}") from error
        return definition, f"tokenizers (gigatoken cannot use this tokenizer: {reason})"
    wrong = fast.differing(SAMPLE)
    if wrong is None:
        return fast, "gigatoken"
    if engine == "gigatoken":
        raise ConfigError(f"--engine gigatoken gives other ids than tokenizers with {tokenizer}: {SAMPLE[wrong]!r}.")
    return definition, f"tokenizers (gigatoken gives other ids for {SAMPLE[wrong]!r})"


def tokenizer_file(path: Path) -> Path:
    """Return the `tokenizer.json` that an option names, itself or by its folder."""
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json` without the truncation and padding it may carry, which would cut or fill documents."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} is no readable tokenizer.json (--tokenizer): {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_token_id(path: Path, token: str, option: str) -> int:
    """Return the id of a token that the tokenizer must have."""
    tokenizer = load_tokenizer(path)
    found = tokenizer.token_to_id(token)
    if found is None:
        special = ", ".join(token.content for token in tokenizer.get_added_tokens_decoder().values())
        raise ConfigError(f"{path} has no token {token!r}; its special tokens are: {special or 'none'} ({option}).")
    return found


# What tokenizers are known to disagree on: spaces, digits, contractions, scripts, joined emoji, broken line ends.
SAMPLE = (
    "Hello world, it's a test; we'll see.  Two  spaces,\ttabs\n\n\nand lines\r\nof all\rkinds \n ",
    "x = {'a': 1234567, \"b\": 3.14159e-10}  # comment\n\tif not x:\n        return None\n",
    "Größe déjà vu naïve Ångström ﬁ ligature Ⅷ ½ e\u0301 \u200b\u00a0\u3000 end",
    "数据 训练 日本語のテキスト 한국어 Русский العربية हिन्दी ไทย 🙂👩‍👩‍👧 🇩🇪",
    "<|endoftext|> [INST] <s> </s> &amp; http://example.org/a?b=c&d=%20",
    "   leading and trailing   ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 000000000000000000000000 !!!!!!!!!!!!!",
)
