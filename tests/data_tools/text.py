"""Text to tokenize in tests, and what comes of it."""

import json
import random
from pathlib import Path

EOD = "<|endoftext|>"
WORDS = ["train", "tokens", "für", "数据", "\n", "  indented", "x=1;", "🙂", "Mamba-2", "déjà vu", "\t", "12345"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of very different lengths, some of them equal, one of them empty."""
    source = random.Random(seed)
    made = [" ".join(source.choices(WORDS, k=int(source.expovariate(0.02)))) for _ in range(count)]
    made[3:5] = ["", made[2]]
    return made


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
