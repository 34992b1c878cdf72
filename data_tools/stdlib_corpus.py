"""How does a fresh machine get real text to train on? From Python itself: code, test code and prose as three sources.

    python -m data_tools stdlib-corpus --output DIR

writes DIR/train/ and DIR/heldout/ with code.jsonl, tests.jsonl and prose.jsonl, one {"text", "path"} per document.

* code: modules of the standard library. tests: its test code; where a distribution leaves that out, the tests of
  installed packages; where there are none, half of the code. prose: docstrings, help texts, licences, descriptions.
* The same installation gives the same bytes. Documents come in the order of a hash of their content, so the first
  ones are a fair sample of all. A text that occurs twice is taken once.
* Whole files are held out: a docstring of a held-out module is held out as well.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from data_tools.console import plain_console
from data_tools.installed_text import Document, Roots, digest, find_modules, find_package_tests, find_prose, find_tests
from nemotron_train.errors import ConfigError, DataError

SOURCES = ("code", "tests", "prose")
HELD_OUT_FRACTION = 0.025
FEWEST_TEST_BYTES = 1_000_000  # below it the standard library counts as shipped without its tests


@dataclass(frozen=True)
class Corpus:
    """Documents of each source, and what has to be said about how they were found."""

    train: dict[str, list[Document]]
    heldout: dict[str, list[Document]]
    notes: tuple[str, ...]


def collect_corpus(roots: Roots, *, max_source_bytes: float) -> Corpus:
    """Find the documents of the three sources.

    Args:
        max_source_bytes: of one source, train and held-out together; documents beyond it are left out at random.
    Raises:
        DataError: this Python shows no source code.
    """
    notes: tuple[str, ...] = ()
    code, tests = find_modules(roots), find_tests(roots)
    if _num_bytes(tests) < FEWEST_TEST_BYTES:
        tests = find_package_tests(roots)
        notes = ("This Python comes without its test package: `tests` are those of installed packages.",)
    if _num_bytes(tests) < FEWEST_TEST_BYTES:
        code, tests = code[0::2], tests + code[1::2]
        notes = ("There is next to no test code on this machine: half of the code stands in for `tests`.",)
    if not code:
        raise DataError(f"no Python source files under {roots.stdlib}: use a Python that has its standard library")
    prose = find_prose(roots, enough_bytes=max_source_bytes)
    found = {"code": code, "tests": tests, "prose": prose}
    found = {source: _first_bytes(documents, max_source_bytes) for source, documents in found.items()}
    held_out = choose_held_out(found)
    return Corpus(
        train={source: [d for d in found[source] if d.path not in held_out] for source in SOURCES},
        heldout={source: [d for d in found[source] if d.path in held_out] for source in SOURCES},
        notes=notes,
    )


def choose_held_out(found: dict[str, list[Document]]) -> set[str]:
    """Return the paths to hold out: of every source about `HELD_OUT_FRACTION` of the bytes, by a hash of the path.

    A path that an earlier source trains on is trained on in later ones too. Documents larger than a quarter of what
    is wanted are left to training (unless most are), so that the held-out text is many documents.
    """
    held_out: set[str] = set()
    decided: set[str] = set()
    for documents in found.values():
        wanted = HELD_OUT_FRACTION * _num_bytes(documents)
        largest = max(wanted / 4, median(document.num_bytes for document in documents)) if documents else 0
        taken = sum(d.num_bytes for d in documents if d.path in held_out)
        for document in sorted(documents, key=lambda d: digest("hold out " + d.path)):
            free = document.path not in decided and document.num_bytes <= largest
            if free and taken < wanted:
                held_out.add(document.path)
                taken += document.num_bytes
        decided.update(document.path for document in documents)
    return held_out


def write_corpus(corpus: Corpus, output: Path) -> None:
    """Write the JSONL files; each appears whole or not at all."""
    for split, sources in (("train", corpus.train), ("heldout", corpus.heldout)):
        folder = output / split
        folder.mkdir(parents=True, exist_ok=True)
        for source, documents in sources.items():
            partial = folder / f"{source}.jsonl.partial"
            with open(partial, "w", encoding="utf-8", newline="\n") as file:
                for document in documents:
                    file.write(json.dumps({"text": document.text, "path": document.path}, ensure_ascii=False) + "\n")
            partial.replace(folder / f"{source}.jsonl")


def _first_bytes(documents: list[Document], max_bytes: float) -> list[Document]:
    kept, num_bytes = [], 0
    for document in documents:
        num_bytes += document.num_bytes
        if num_bytes > max_bytes:
            break
        kept.append(document)
    return kept


def _num_bytes(documents: list[Document]) -> int:
    return sum(document.num_bytes for document in documents)


def run(arguments: argparse.Namespace) -> None:
    if not arguments.max_mb > 0:
        raise ConfigError(f"--max-mb {arguments.max_mb} must be above 0; inf takes all there is.")
    corpus = collect_corpus(Roots.of_this_python(), max_source_bytes=arguments.max_mb / len(SOURCES) * 1e6)
    write_corpus(corpus, arguments.output)
    console = plain_console()
    for note in corpus.notes:
        console.print(note)
    for source in SOURCES:
        train, heldout = corpus.train[source], corpus.heldout[source]
        console.print(
            f"{source:6} {len(train):5} documents, {_num_bytes(train) / 1e6:5.2f} MB to train on; "
            f"{len(heldout):4} documents, {_num_bytes(heldout) / 1e6:4.2f} MB held out"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="gets the folders train and heldout")
    add("--max-mb", type=float, default=24.0, metavar="MB", help="size of it all at most, or inf (default 24)")
