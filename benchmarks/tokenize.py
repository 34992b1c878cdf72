"""How fast does text become shards? The tool, one process, beside Hugging Face's `encode_batch` alone and beside
Megatron-Core's builder fed by it, on the same text.

    python -m benchmarks.tokenize OUT [--megabytes N]

The text is what comes with Python, repeated with changes to the wanted size; the tokenizer is a byte-level BPE of
65,536 tokens trained on it, with GPT-2's way of splitting text. Both are kept in OUT for the next time.
"""

import argparse
import json
import os
import sysconfig
import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_tools.encoders import choose_engine
from data_tools.source_record import TokenizeSettings
from data_tools.tokenize_corpus import tokenize
from data_tools.tokenize_work import encoder_of

EOD = "<|endoftext|>"
COMPARED_DOCUMENTS = 3000  # of the slow ways: their speed does not change with the amount


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one thread, for all
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = texts()
    corpus = write_corpus(arguments.out / f"text_{arguments.megabytes}.jsonl", documents, arguments.megabytes)
    tokenizer = trained_tokenizer(arguments.out / "tokenizer.json", documents)
    print("engine:", choose_engine(tokenizer, "auto", parse_special_tokens=False)[1])
    some = documents[:COMPARED_DOCUMENTS]
    rows = {
        "data_tools tokenize, JSONL to shards": ours(arguments.out, corpus, tokenizer),
        "tokenizers encode_batch, text to ids only": encode_batch(tokenizer, some),
        "tokenizers, Megatron-Core's builder": megatron(arguments.out, tokenizer, some),
    }
    first = next(iter(rows.values()))
    table = Table("one process", "Mtokens/s", "MB/s", "ours is")
    for name, (tokens, megabytes) in rows.items():
        table.add_row(name, f"{tokens:.2f}", f"{megabytes:.1f}", f"{first[0] / tokens:.1f}x")
    Console(width=120).print(table)


def texts() -> list[str]:
    """Return the library's own sources, large and small."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        try:
            found.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    return [text for text in found if text]


def write_corpus(path: Path, documents: list[str], megabytes: int) -> Path:
    """Write documents over and over, each time cut elsewhere, so that no two are the same."""
    if path.exists():
        return path
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        written, turn = 0, 0
        while written < megabytes * 1_000_000:
            for number, document in enumerate(documents):
                text = document[(turn * 37) % max(1, len(document) // 2) :]
                written += file.write(json.dumps({"id": f"{turn}-{number}", "text": text}, ensure_ascii=False) + "\n")
            turn += 1
    path.with_suffix(".tmp").replace(path)
    return path


def trained_tokenizer(path: Path, documents: list[str]) -> Path:
    if path.exists():
        return path
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=65_536, special_tokens=[EOD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return path


def ours(out: Path, corpus: Path, tokenizer: Path) -> tuple[float, float]:
    """Return Mtokens/s and MB/s, end to end: reading, comparing one document in 1,000, shuffling, hashing, writing."""
    settings = TokenizeSettings("text", tokenizer)
    encoder_of(settings)  # what loading costs is once a process
    folder = out / f"shards_{time.time_ns()}"
    began = time.perf_counter()
    made = tokenize([corpus], folder, settings, 1)
    seconds = time.perf_counter() - began
    assert made is not None
    return made.tokens / seconds / 1e6, corpus.stat().st_size / seconds / 1e6


def encode_batch(tokenizer: Path, documents: list[str]) -> tuple[float, float]:
    library = Tokenizer.from_file(str(tokenizer))
    began = time.perf_counter()
    tokens = sum(len(encoding.ids) for encoding in library.encode_batch(documents, add_special_tokens=False))
    return rates(tokens, documents, began)


def megatron(out: Path, tokenizer: Path, documents: list[str]) -> tuple[float, float]:
    library = Tokenizer.from_file(str(tokenizer))
    prefix = out / "megatron"
    began = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    tokens = 0
    for document in documents:
        ids = library.encode(document, add_special_tokens=False).ids
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return rates(tokens, documents, began)


def rates(tokens: int, documents: list[str], began: float) -> tuple[float, float]:
    seconds = time.perf_counter() - began
    return tokens / seconds / 1e6, sum(len(text.encode()) for text in documents) / seconds / 1e6


if __name__ == "__main__":
    main()
