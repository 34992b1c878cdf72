"""The quickstart's corpus: the same every time, nothing held out is trained on, every source filled on any machine.

Small made-up installations stand in for Python distributions, so the tests do not depend on the one they run in.
"""

import json
from pathlib import Path

import pytest

from data_tools.installed_text import Document, Roots, docstrings_of, find_modules, find_prose, find_tests, unique
from data_tools.stdlib_corpus import FEWEST_TEST_BYTES, SOURCES, choose_held_out, collect_corpus, write_corpus
from nemotron_train.errors import DataError


def module_text(name: str, kilobytes: int = 1) -> str:
    body = "".join(f"    value_{i} = compute_{name}({i})\n" for i in range(32 * kilobytes))
    docstring = f"What {name} is about, told in one long sentence so that it counts as a docstring of {name}."
    return f'"""{docstring}"""\n\n\ndef {name}():\n{body}'


def add_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def installation(root: Path, *, stdlib_tests: bool = True, site_tests: bool = True) -> Roots:
    """Write 60 modules, 60 tests that suffice, two packages and their texts."""
    test_kilobytes = 1 + FEWEST_TEST_BYTES // 60_000
    for i in range(60):
        add_file(root / f"lib/module{i}.py", module_text(f"module{i}", kilobytes=4))
        if stdlib_tests:
            add_file(root / f"lib/test/test_module{i}.py", module_text(f"test_module{i}", test_kilobytes))
        if site_tests:
            add_file(root / f"site/package/tests/test_part{i}.py", module_text(f"test_part{i}", test_kilobytes))
        add_file(root / f"site/package/part{i}.py", '"""' + f"Part {i} of a package with a long story. " * 20 + '"""\n')
    add_file(root / "lib/site-packages/foreign.py", module_text("foreign"))
    add_file(root / "lib/encodings/table.py", module_text("table"))
    add_file(root / "site/package-1.0.dist-info/METADATA", "Name: package\n\n" + "A package that tells stories. " * 20)
    add_file(root / "site/nemotron_train-1.0.dist-info/METADATA", "Name: own\n\n" + "What changes every day. " * 20)
    return Roots(stdlib=root / "lib", site=(root / "site",))


def texts(documents: list[Document]) -> set[str]:
    return {document.text for document in documents}


def test_the_same_installation_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    """Fails if the order of a folder listing, a time or a path outside the installation enters."""
    for place in ("one", "another"):
        corpus = collect_corpus(installation(tmp_path / place), max_source_bytes=200_000)
        write_corpus(corpus, tmp_path / f"{place}-corpus")
    files = sorted(path.relative_to(tmp_path / "one-corpus") for path in (tmp_path / "one-corpus").rglob("*.jsonl"))
    assert [str(file) for file in files] == [
        f"{split}/{s}.jsonl" for split in ("heldout", "train") for s in sorted(SOURCES)
    ]
    for file in files:
        assert (tmp_path / "one-corpus" / file).read_bytes() == (tmp_path / "another-corpus" / file).read_bytes()


def test_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    """Fails if a text or a file is in both splits: also the docstring of a module in prose and the module in code."""
    corpus = collect_corpus(installation(tmp_path), max_source_bytes=10_000_000)
    train = [document for source in SOURCES for document in corpus.train[source]]
    heldout = [document for source in SOURCES for document in corpus.heldout[source]]
    assert {document.path for document in train}.isdisjoint(document.path for document in heldout)
    assert texts(train).isdisjoint(texts(heldout))
    for source in SOURCES:
        num_heldout = sum(document.num_bytes for document in corpus.heldout[source])
        num_all = num_heldout + sum(document.num_bytes for document in corpus.train[source])
        assert 0.015 < num_heldout / num_all < 0.05, source


def test_a_path_that_one_source_trains_on_is_not_held_out_by_the_next() -> None:
    """Fails if sources choose for themselves."""
    code = [Document(text="x" * 1000, path=f"stdlib/m{i}.py") for i in range(400)]
    held_out_code = choose_held_out({"code": code})
    trained = [document for document in code if document.path not in held_out_code]
    prose = [Document(text="y" * 100, path=document.path) for document in trained]
    others = [Document(text="z" * 100, path=f"site/m{i}.py") for i in range(40)]
    held_out = choose_held_out({"code": code, "prose": prose + others})
    assert held_out_code < held_out
    assert held_out - held_out_code <= {document.path for document in others}


def test_documents_of_the_sources_come_from_where_they_should(tmp_path: Path) -> None:
    """Fails if tests count as code, tables or foreign packages as the standard library, or a header as prose; or if
    this package's own README is among the texts, whose next line would make another corpus."""
    roots = installation(tmp_path)
    assert {document.path for document in find_modules(roots)} == {f"stdlib/module{i}.py" for i in range(60)}
    assert {document.path for document in find_tests(roots)} == {f"stdlib/test/test_module{i}.py" for i in range(60)}
    prose = {document.path: document.text for document in find_prose(roots, enough_bytes=10_000_000)}
    assert set(prose) >= {f"site/package/part{i}.py" for i in range(60)}
    assert prose["site/package-1.0.dist-info/METADATA"].startswith("A package that tells stories.")
    assert not any("test_" in path or "nemotron_train" in path for path in prose)


def test_a_python_without_its_tests_takes_those_of_packages(tmp_path: Path) -> None:
    """Fails if a distribution that leaves the test package out gets an empty source, or nothing is said about it."""
    corpus = collect_corpus(installation(tmp_path, stdlib_tests=False), max_source_bytes=10_000_000)
    paths = [document.path for document in corpus.train["tests"] + corpus.heldout["tests"]]
    assert sorted(paths) == sorted(f"site/package/tests/test_part{i}.py" for i in range(60))
    assert len(corpus.notes) == 1


def test_a_machine_without_any_tests_takes_a_part_of_the_code(tmp_path: Path) -> None:
    """Fails if the source stays empty, or a module is in two sources."""
    roots = installation(tmp_path, stdlib_tests=False, site_tests=False)
    corpus = collect_corpus(roots, max_source_bytes=10_000_000)
    code = texts(corpus.train["code"] + corpus.heldout["code"])
    tests = texts(corpus.train["tests"] + corpus.heldout["tests"])
    assert len(code) == len(tests) == 30
    assert code.isdisjoint(tests)
    assert [("half of the code" in note) for note in corpus.notes] == [True]


def test_a_smaller_corpus_is_a_part_of_the_larger(tmp_path: Path) -> None:
    """Fails if the limit is exceeded, or documents are not taken in the order of their hash."""
    roots = installation(tmp_path)
    small = collect_corpus(roots, max_source_bytes=20_000)
    large = collect_corpus(roots, max_source_bytes=10_000_000)
    for source in SOURCES:
        taken = small.train[source] + small.heldout[source]
        assert sum(document.num_bytes for document in taken) <= 20_000
        assert texts(taken) < texts(large.train[source] + large.heldout[source])


def test_a_text_that_occurs_twice_is_taken_once() -> None:
    """Fails if copies stay: one could be trained on while the other is held out."""
    licence = "Copyright (c) 2020 {}\n\nPermission is granted to everyone.\n"
    documents = [Document(licence.format(name), f"{name}/LICENSE") for name in ("ann", "bob")]
    assert unique([*documents, None, Document("Another text", "c")]) in (
        [documents[0], Document("Another text", "c")],
        [Document("Another text", "c"), documents[0]],
    )


def test_the_order_of_documents_is_that_of_a_hash_of_their_text() -> None:
    """Fails if the order depends on where a document was found: neighbours would come from one package."""
    documents = [Document(f"text number {i}", f"folder{i % 3}/{i}") for i in range(50)]
    assert unique(documents) == unique(reversed(documents))
    assert unique(documents) != documents


def test_docstrings_stand_under_the_name_of_what_they_explain() -> None:
    """Fails if a nested function or a class loses its name, or a short or absent docstring leaves a bare name."""
    long = "A sentence that is certainly longer than forty characters."
    source = (
        f'"""{long} 0"""\nclass A:\n  """{long} 1"""\n  async def f(self):\n    """{long} 2"""\ndef g():\n  "short"\n'
    )
    assert docstrings_of(source) == f"{long} 0\n\n\nA\n\n{long} 1\n\n\nA.f\n\n{long} 2"


def test_lines_are_the_documents(tmp_path: Path) -> None:
    """Fails if a text changes on its way to disk, e.g. by line ends or escapes."""
    text = 'tabs\t "quotes" \\ and \r\n line ends \u2028 ümläut 日本 \x00\n'
    corpus = collect_corpus(installation(tmp_path / "python"), max_source_bytes=100_000)
    corpus.train["code"][0] = Document(text, "stdlib/odd.py")
    write_corpus(corpus, tmp_path)
    with open(tmp_path / "train" / "code.jsonl", encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    assert read[0] == {"text": text, "path": "stdlib/odd.py"}
    assert len(read) == len(corpus.train["code"])


def test_a_python_without_source_files_is_explained(tmp_path: Path) -> None:
    """Fails if an empty corpus is written without a word."""
    (tmp_path / "lib").mkdir()
    with pytest.raises(DataError, match="no Python source files under"):
        collect_corpus(Roots(stdlib=tmp_path / "lib", site=()), max_source_bytes=1000)
