"""Is the fast engine used where it gives the same ids, and nowhere else? Oracle: the `tokenizers` library."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data_tools.encoders import DocumentEncoder, GigatokenEncoder
from data_tools.source_record import TokenizeSettings
from data_tools.tokenize_corpus import tokenize
from data_tools.tokenize_work import encoder_of
from nemotron_train.errors import ConfigError, DataError
from tests.data_tools.text import EOD, files_of, texts, write_jsonl


def test_both_engines_give_the_same_shards(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if the fast engine is not used where it can be, or gives other ids."""
    encoder = DocumentEncoder(tokenizer_path, EOD, "auto", parse_special_tokens=False)
    assert encoder.engine_text == "gigatoken"
    source = write_jsonl(tmp_path / "web.jsonl", [*texts(300), f"spelled {EOD} out"])
    for engine in ("gigatoken", "tokenizers"):
        tokenize([source], tmp_path / engine, TokenizeSettings("web", tokenizer_path, num_shards=2, engine=engine), 1)
    assert files_of(tmp_path / "gigatoken") == files_of(tmp_path / "tokenizers")


def test_a_difference_between_the_engines_stops_the_job_and_names_the_document(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the fast engine is trusted: a wrong id in one document of thousands would go unseen."""
    encode = GigatokenEncoder.__call__

    def wrong(self: GigatokenEncoder, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = encode(self, documents)
        if documents and documents[-1] == "the seventh":
            ids = ids.copy()
            ids[-1] += 1
        return ids, lengths

    monkeypatch.setattr(GigatokenEncoder, "__call__", wrong)
    encoder_of.cache_clear()
    source = write_jsonl(tmp_path / "web.jsonl", [*(f"document {number}" for number in range(6)), "the seventh"])
    with pytest.raises(DataError, match=r"web\.jsonl, line 7: gigatoken gives other token ids than tokenizers"):
        tokenize([source], tmp_path / "out", TokenizeSettings("web", tokenizer_path, engine="gigatoken"), 1)
    assert not (tmp_path / "out" / "web.manifest.json").exists()
    encoder_of.cache_clear()


def test_the_fast_engine_is_not_used_where_it_differs(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if `auto` stops, or goes on silently, with a tokenizer that gigatoken does not know."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, EOD: 1}, unk_token="a"))
    tokenizer.add_special_tokens([EOD])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = DocumentEncoder(tmp_path / "tokenizer.json", EOD, "auto", parse_special_tokens=False)
    assert encoder.engine_text.startswith("tokenizers (gigatoken ")
    with pytest.raises(ConfigError, match="--engine gigatoken"):
        DocumentEncoder(tmp_path / "tokenizer.json", EOD, "gigatoken", parse_special_tokens=False)
