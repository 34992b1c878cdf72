"""The trained tokenizer has the asked size, loses no byte and is the same every time."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from tokenizers import Tokenizer

from data_tools.__main__ import main
from data_tools.train_tokenizer import END_OF_DOCUMENT, train_tokenizer
from nemotron_train.errors import ConfigError, DataError

VOCAB_SIZE = 600


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files' worth of this project's own code and texts, as JSONL."""
    repository = Path(__file__).parents[2]
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    files = sorted((repository / "nemotron_train").rglob("*.py"))[:30]
    path.write_text("".join(json.dumps({"text": file.read_text(encoding="utf-8")}) + "\n" for file in files))
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer([corpus], vocab_size=VOCAB_SIZE, sample_bytes=10**9)


def random_texts() -> list[str]:
    """Every byte value in UTF-8 form, all planes of Unicode, and every kind of blank."""
    rng = random.Random(0)
    alphabet = [chr(i) for i in range(256)] + list("\u2028\u3000\u200b日本語éß🙂𝔘\U000e0001")
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(200)]
    return [*texts, "", " ", "\n", "\r\n\r\n", "    indented\n\t\ttabs  \n", "x = 12345678\n", "don't I'LL"]


def test_every_text_comes_back_unchanged(tokenizer: Tokenizer) -> None:
    """Fails if a byte has no token, or pre-tokenization drops or adds a blank."""
    for text in random_texts():
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_it_has_exactly_the_asked_size_and_the_end_of_document_token(tokenizer: Tokenizer) -> None:
    """Fails if ids reach beyond the model's embedding, or leave rows of it unused."""
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    assert tokenizer.encode(f"a{END_OF_DOCUMENT}b").ids.count(end) == 1


def test_training_twice_gives_the_same_file(corpus: Path, tokenizer: Tokenizer) -> None:
    """Fails if threads or hash seeds enter: shards of two machines would not fit together."""
    again = train_tokenizer([corpus], vocab_size=VOCAB_SIZE, sample_bytes=10**9)
    assert again.to_str() == tokenizer.to_str()


def test_it_merges_what_is_frequent(tokenizer: Tokenizer, corpus: Path) -> None:
    """Fails if merges are not learned from the text: bytes alone would give one token per byte."""
    text = json.loads(corpus.read_text().splitlines()[0])["text"] + "    return self.value\n"
    assert len(tokenizer.encode(text).ids) < 0.6 * len(text.encode())
    assert "Ġreturn" in tokenizer.get_vocab()


def test_numbers_are_cut_after_three_digits_and_lines_after_their_end(tokenizer: Tokenizer) -> None:
    """Fails if a token spans more than the pattern's pieces allow."""
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 1234567;\n    b")]
    assert pieces == ["a", "Ġ", "123", "456", "7", ";Ċ", "ĠĠĠ", "Ġb"]


def test_only_the_asked_part_of_a_file_is_learned_from(tmp_path: Path) -> None:
    """Fails if the sample limit is ignored: the second document would bring its word into the vocabulary."""
    path = tmp_path / "two.jsonl"
    first = " ".join(f"word{i} thing{i * 7}" for i in range(300))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (first, "zebrafish " * 500)))
    part = train_tokenizer([path], vocab_size=300, sample_bytes=100)
    whole = train_tokenizer([path], vocab_size=300, sample_bytes=10**9)
    assert "Ġzebrafish" in whole.get_vocab()
    assert "Ġzebrafish" not in part.get_vocab()


def test_impossible_requests_are_explained(tmp_path: Path) -> None:
    """Fails if a user gets a tokenizer of another size, or an error without the file and line."""
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "abc"}\n{"test": "abc"}\n')
    with pytest.raises(ConfigError, match="--vocab-size 257"):
        train_tokenizer([path], vocab_size=257, sample_bytes=100)
    with pytest.raises(DataError, match=r"short\.jsonl, line 2"):
        train_tokenizer([path], vocab_size=300, sample_bytes=100)
    path.write_text('{"text": "abc"}\n')
    with pytest.raises(DataError, match="not the 300 asked for"):
        train_tokenizer([path], vocab_size=300, sample_bytes=100)
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        train_tokenizer([tmp_path / "missing.jsonl"], vocab_size=300, sample_bytes=100)


def test_whole_files_can_be_asked_for_and_no_less_than_nothing(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a size that is no number of bytes ends in a traceback, or quietly takes one document of each file."""
    output = tmp_path / "tokenizer.json"
    arguments = ["train-tokenizer", "--input", str(corpus), "--vocab-size", "300", "--output", str(output)]
    for size in ("nan", "-1", "0"):
        assert main([*arguments, f"--sample-mb={size}"]) == 1
        assert "must be above 0" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments, "--sample-mb=inf"]) == 0


def test_documents_are_read_as_tokenize_reads_them(tmp_path: Path) -> None:
    """Fails if a format, a folder, a null text, a blank line or another key is read by one of the two commands only."""
    words = [f"word{number} thing{number * 7} déjà\r\nvu" for number in range(300)]
    lines = "".join(json.dumps({"body": text}) + "\n\n" for text in (*words, None)).encode()
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstandard.compress(lines)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    parquet.write_table(pyarrow.table({"body": [*words, None]}), tmp_path / "a.parquet")
    for number, text in enumerate(words):
        (folder / f"{number:03d}.c").write_bytes(text.encode())
    made = set()
    for name in (*contents, "a.parquet", "folder"):
        output = tmp_path / f"{name}.tokenizer.json"
        options = ["--vocab-size", "300", "--text-key", "body", "--text-suffix", ".c", "--output", str(output)]
        assert main(["train-tokenizer", "--input", str(tmp_path / name), *options]) == 0
        made.add(output.read_bytes())
    assert len(made) == 1
