"""Is the fast engine used where it gives the same ids, and nowhere else? Oracle: the `tokenizers` library."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools import encoders
from data_tools.documents import Document
from data_tools.encoders import DocumentEncoder, GigatokenEncoder
from data_tools.source_record import TokenizeSettings
from data_tools.tokenize_corpus import tokenize
from data_tools.tokenize_work import encoder_of
from nemotron_train.data.shard import Shard
from nemotron_train.errors import ConfigError, DataError
from tests.data_tools.text import EOD, files_of, texts, write_jsonl


def test_both_engines_give_the_same_shards(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if the fast engine is not used where it can be, or gives other ids."""
    encoder = DocumentEncoder(TokenizeSettings("web", tokenizer_path, engine="auto"))
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
    encoder = DocumentEncoder(TokenizeSettings("web", tmp_path / "tokenizer.json", engine="auto"))
    assert encoder.engine_text.startswith("tokenizers (gigatoken ")
    with pytest.raises(ConfigError, match="--engine gigatoken"):
        DocumentEncoder(TokenizeSettings("web", tmp_path / "tokenizer.json", engine="gigatoken"))


def test_long_texts_are_encoded_in_pieces_and_get_the_same_ids(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a text is cut where a token would have been, or a piece is lost: shards would depend on the limit."""
    code = Path(__file__).read_text(encoding="utf-8")
    prose = " ".join(code.split())  # no line ends
    documents = [Document(text, "here") for text in (code, *texts(50), prose, "\n\n  x" * 500)]
    encoder = DocumentEncoder(TokenizeSettings("web", tokenizer_path, engine="tokenizers"))
    whole = encoder(documents, 0)
    monkeypatch.setattr(encoders, "LONGEST_PIECE", 300)
    monkeypatch.setattr(encoders, "SEAM_CHARACTERS", 200)
    monkeypatch.setattr(encoders, "ENCODED_CHARACTERS", 100)
    cut = encoder(documents, 0)
    assert cut.tokens[: whole.lengths[:-1].sum()].tolist() == whole.tokens[: whole.lengths[:-1].sum()].tolist()
    assert cut.lengths[:-1].tolist() == whole.lengths[:-1].tolist()
    # Without a seam a text is cut anywhere, and still nothing is lost.
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.decode(cut.tokens[-cut.lengths[-1] :].tolist()) == "\n\n  x" * 500


def test_the_fast_engine_knows_added_tokens_that_are_not_special(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if tokenizers with tokens for indentation fall back to the slow engine, or a special token that is spelled
    out ends a document."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = DocumentEncoder(TokenizeSettings("web", tmp_path / "tokenizer.json"))
    assert encoder.engine_text == "gigatoken"
    slow = DocumentEncoder(TokenizeSettings("web", tmp_path / "tokenizer.json", engine="tokenizers"))
    documents = [Document(text, "here") for text in (f"if x:\n        y  {EOD}", "     five")]
    assert encoder(documents, 0).tokens.tolist() == slow(documents, 0).tokens.tolist()
    assert (encoder(documents, 0).tokens == encoder.eod_id).sum() == 2


def test_documents_cut_between_characters_hold_their_text(tmp_path: Path) -> None:
    """Fails if a piece is lost or in the wrong place, a sentinel is missing, or the cut depends on the workers."""
    names = [EOD, "<pre>", "<suf>", "<mid>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(50), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    documents = [text for text in texts(800) if text]
    source = write_jsonl(tmp_path / "web.jsonl", documents)
    settings = TokenizeSettings(
        "web", tmp_path / "tokenizer.json", num_shards=1, fim_rate=0.5, fim_spm_rate=0.3, fim_tokens=tuple(names[1:])
    )
    made = tokenize([source], tmp_path / "out", settings, 1)
    assert made is not None
    shard = Shard(tmp_path / "out" / made.shards[0])
    found, forms = [], Counter[str]()
    for tokens in np.split(shard.read(0, shard.num_tokens), shard.document_ends())[:-1]:
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False).removesuffix(EOD)
        if text.startswith("<pre><suf>"):
            suffix, rest = text.removeprefix("<pre><suf>").split("<mid>")
            forms["suffix first"] += 1
            found.append(rest + suffix)
        elif text.startswith("<pre>"):
            prefix, rest = text.removeprefix("<pre>").split("<suf>")
            suffix, middle = rest.split("<mid>")
            forms["prefix first"] += 1
            found.append(prefix + middle + suffix)
        else:
            forms["whole"] += 1
            found.append(text)
    assert sorted(found) == sorted(documents)
    assert forms["whole"] / len(documents) == pytest.approx(0.5, abs=0.06)
    assert forms["suffix first"] / (forms["suffix first"] + forms["prefix first"]) == pytest.approx(0.3, abs=0.08)
    tokenize([source], tmp_path / "again", settings, 2)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--fim-spm-rate 7 must be from 0 to 1"):
        tokenize([source], tmp_path / "x", replace(settings, fim_spm_rate=7), 1)
    with pytest.raises(ConfigError, match=r"--fim-rate 0.5 and --fim-tokens \(none\)"):
        tokenize([source], tmp_path / "x", replace(settings, fim_tokens=()), 1)
