"""What text lies on a machine with Python? Finds modules, test code and prose of the standard library and of packages.

Everything is found in an order that depends on names alone, so that one installation always gives the same documents.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "testing"})
# Tables written by programs, text that is taken as prose, and packages that live inside the standard library's folder.
SKIPPED_FOLDERS = frozenset(
    {"encodings", "encoded_modules", "cjkencodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)
PROSE_SUFFIXES = frozenset({".txt", ".rst", ".md"})
PROSE_NAMES = ("LICENSE", "LICENCE", "COPYING", "METADATA", "README")
OWN = "nemotron_train"  # whose files start so: the corpus would be another one after every change to this package
SMALLEST_DOCUMENT_BYTES = 200
LARGEST_DOCUMENT_BYTES = 300_000  # beyond it: data in disguise


@dataclass(frozen=True)
class Document:
    text: str
    path: str  # where it came from, e.g. stdlib/json/decoder.py

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Roots:
    """Where text is looked for."""

    stdlib: Path
    site: tuple[Path, ...]  # folders of installed packages

    @staticmethod
    def of_this_python() -> "Roots":
        paths = sysconfig.get_paths()
        site = {Path(paths[name]) for name in ("purelib", "platlib")}
        return Roots(stdlib=Path(paths["stdlib"]), site=tuple(sorted(path for path in site if path.is_dir())))


def find_modules(roots: Roots) -> list[Document]:
    """Return the standard library's modules without its tests."""
    return unique(_read(path, name) for path, name in _stdlib_files(roots) if not is_test(name))


def find_tests(roots: Roots) -> list[Document]:
    """Return the standard library's test code; some distributions leave it out."""
    return unique(_read(path, name) for path, name in _stdlib_files(roots) if is_test(name))


def find_package_tests(roots: Roots) -> list[Document]:
    """Return the test code that came with installed packages."""
    return unique(_read(path, name) for path, name in _site_files(roots) if is_test(name))


def find_prose(roots: Roots, *, enough_bytes: float) -> list[Document]:
    """Return text files and docstrings: the standard library's, then packages' until there is enough."""
    return unique(_prose(roots, enough_bytes))


def unique(documents: Iterable[Document | None]) -> list[Document]:
    """Return the documents in the order of a hash of their text, which is a fair shuffle, and each text once.

    Spacing and copyright lines do not make a text another one: most licences differ in nothing else.
    """
    by_digest: dict[bytes, Document] = {}
    for document in documents:
        if document is not None:
            words = re.sub(r"(?im)^.*copyright.*$", "", document.text).split()
            by_digest.setdefault(digest(" ".join(words)), document)
    return [by_digest[key] for key in sorted(by_digest)]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_test(name: str) -> bool:
    *folders, file = name.split("/")
    return bool(TEST_FOLDERS & set(folders)) or file.startswith("test_")


def docstrings_of(source: str) -> str:
    """Return the docstrings of a module, each under the name of what it explains; empty where there are none.

    Raises:
        SyntaxError: the text is not Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in somebody's string is not news here
        module = ast.parse(source)
    parts: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        text = ast.get_docstring(node)
        if text and len(text) >= 40:
            parts.append(f"{name}\n\n{text}" if name else text)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}" if name else child.name)

    visit(module, "")
    return "\n\n\n".join(parts)


def _prose(roots: Roots, enough_bytes: float) -> Iterator[Document | None]:
    num_bytes = 0
    for document in _text_files(roots):
        num_bytes += document.num_bytes
        yield document
    for path, name in _stdlib_files(roots) + _site_files(roots):
        if num_bytes > enough_bytes and name.startswith("site/"):
            return
        document_or_none = None if is_test(name) else _docstrings(path, name)
        if document_or_none is not None:
            num_bytes += document_or_none.num_bytes
            yield document_or_none


def _text_files(roots: Roots) -> Iterator[Document]:
    topics = roots.stdlib / "pydoc_data" / "topics.py"
    if topics.exists():
        yield from _help_topics(topics)
    for root, label in ((roots.stdlib, "stdlib"), *((site, "site") for site in roots.site)):
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if inside.parts[0].startswith(OWN):
                continue
            if label == "stdlib" and (SKIPPED_FOLDERS & set(inside.parts) or is_test(inside.as_posix())):
                continue
            if path.suffix not in PROSE_SUFFIXES and not path.name.startswith(PROSE_NAMES):
                continue
            document = _read(path, f"{label}/{inside.as_posix()}")
            if document and path.name == "METADATA":  # the description follows the header
                document = Document(text=document.text.partition("\n\n")[2], path=document.path)
            # Names and numbers one a line (entry points, word lists) are no prose.
            if document and document.text.count(" ") > 4 * document.text.count("\n"):
                yield document


def _help_topics(path: Path) -> Iterator[Document]:
    """Yield Python's interactive help texts: the file says `topics = {"assert": "..."}`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(text=text, path=f"stdlib/pydoc_data/topics/{topic}")


def _docstrings(path: Path, name: str) -> Document | None:
    module = _read(path, name)
    try:
        text = docstrings_of(module.text) if module else ""
    except (SyntaxError, ValueError, RecursionError):  # templates, or another version's syntax
        return None
    return Document(text=text + "\n", path=name) if len(text) >= SMALLEST_DOCUMENT_BYTES else None


def _stdlib_files(roots: Roots) -> list[tuple[Path, str]]:
    return sorted(_python_files(roots.stdlib, "stdlib"), key=lambda entry: entry[1])


def _site_files(roots: Roots) -> list[tuple[Path, str]]:
    """Return the modules of installed packages in the order of a hash of their names: no package comes first."""
    files = [entry for site in roots.site for entry in _python_files(site, "site")]
    return sorted(files, key=lambda entry: digest(entry[1]))


def _python_files(root: Path, label: str) -> Iterator[tuple[Path, str]]:
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not SKIPPED_FOLDERS & set(inside.parts):
            yield path, f"{label}/{inside.as_posix()}"


def _read(path: Path, name: str) -> Document | None:
    """Return the file as a document; None where it is too small, too large, unreadable or not UTF-8."""
    try:
        if not SMALLEST_DOCUMENT_BYTES <= path.stat().st_size <= LARGEST_DOCUMENT_BYTES:
            return None
        return Document(text=path.read_text(encoding="utf-8"), path=name)
    except (OSError, UnicodeDecodeError):
        return None
