"""Oracle: the `tokenizers` library, document by document; the files of a run with other workers or of a killed one."""

import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import xxhash
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

from data_tools.__main__ import main
from data_tools.documents import find_files, read_documents
from data_tools.parts import plan_parts
from data_tools.source_record import TokenizedSource, TokenizeSettings
from data_tools.tokenize_corpus import lock, tokenize
from nemotron_train.data.shard import Shard
from nemotron_train.data.shard_meta import read_manifest, read_meta
from nemotron_train.errors import ConfigError, DataError
from tests.data_tools.text import EOD, files_of, texts, write_jsonl


def made_by(*arguments: Any, **options: Any) -> TokenizedSource:
    made = tokenize(*arguments, **options)
    assert made is not None
    return made


def documents_in(folder: Path, shards: list[str]) -> list[tuple[int, ...]]:
    found = []
    for name in shards:
        shard = Shard(folder / name)
        stream = shard.read(0, shard.num_tokens)
        found += [tuple(document.tolist()) for document in np.split(stream, shard.document_ends())[:-1]]
    return found


def expected_ids(tokenizer_path: Path, documents: list[str]) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eod = tokenizer.token_to_id(EOD)
    assert eod is not None
    return [(*tokenizer.encode(text).ids, eod) for text in documents if text]


def test_shards_hold_what_the_tokenizers_library_gives_document_by_document(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    """Fails if a document is cut, padded, lost, doubled, split over shards, or not ended by its token."""
    documents = texts(300)
    settings = TokenizeSettings("web", tokenizer_path, num_shards=5)
    made = made_by([write_jsonl(tmp_path / "web.jsonl", documents)], tmp_path / "out", settings, num_workers=1)
    found, expected = documents_in(tmp_path / "out", made.shards), expected_ids(tokenizer_path, documents)
    assert Counter(found) == Counter(expected)
    assert (made.documents, made.tokens) == (len(expected), sum(map(len, expected)))
    assert len(made.shards) == 5
    sizes = [Shard(tmp_path / "out" / name).num_tokens for name in made.shards]
    assert max(sizes) < 2 * min(sizes)
    # Neighbours in a shard are not neighbours in the input.
    place = {document: number for number, document in enumerate(expected)}
    distances = [abs(place[after] - place[before]) for before, after in pairwise(found)]
    assert sum(distance < 10 for distance in distances) < 0.15 * len(distances)  # by chance 7 in 100


def test_output_does_not_depend_on_who_does_the_work(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if results are collected as they come in, or another number of processes or tasks gives other shards."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(300) * 10)
    settings = TokenizeSettings("web", tokenizer_path, num_shards=4)
    monkeypatch.setattr("data_tools.tokenize_corpus.plan_parts", partial(plan_parts, part_bytes=1 << 16))
    assert len(plan_parts([source], 1 << 16)) > 5
    for workers in (1, 3):
        tokenize([source], tmp_path / str(workers), settings, workers)
    for task in (2, 0, 1):
        tokenize([source], tmp_path / "tasks", settings, 1, task=(task, 3))
    assert len(files_of(tmp_path / "1")) == 4 * 3 + 1
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3") == files_of(tmp_path / "tasks")


def test_tasks_that_finish_together_both_end_well(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if the second of two tasks that find all parts done is refused while the first writes the shards."""
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", texts(50, seed=n)) for n in range(2)]
    settings, out = TokenizeSettings("web", tokenizer_path, num_shards=2), tmp_path / "out"
    assert tokenize(sources, out, settings, 1, task=(0, 2)) is None
    results: list[object] = []
    with lock(out / ".web.work" / "shards.lock"):
        task = threading.Thread(target=lambda: results.append(tokenize(sources, out, settings, 1, task=(1, 2))))
        task.start()
        task.join(timeout=1.0)  # long enough to be refused; a slow machine only makes the test easier to pass
    task.join()
    assert len(results) == 1
    assert (out / "web.manifest.json").exists()


def test_another_seed_is_another_order_of_the_same_documents(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if --seed has no effect, or changes more than the order."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(100))
    found = []
    for seed in (0, 1):
        made = made_by([source], tmp_path / str(seed), TokenizeSettings("web", tokenizer_path, seed=seed), 1)
        found.append(documents_in(tmp_path / str(seed), made.shards))
    assert found[0] != found[1]
    assert Counter(found[0]) == Counter(found[1])


def test_every_input_format_gives_the_same_documents(tmp_path: Path) -> None:
    """Fails if a format loses, splits or changes a text, e.g. at a line separator within it or between zstd frames."""
    documents = [text + "\u2028 \x85 end\r\nlast" for text in texts(60)]
    lines = [json.dumps({"body": text, "id": 1}, ensure_ascii=False).encode() + b"\n" for text in documents]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines).rstrip(b"\n") + b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    whole = b"".join(lines)
    frames = (whole[:5000], whole[5000:])
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    parquet.write_table(pyarrow.table({"n": range(60), "body": documents}), tmp_path / "a.parquet", row_group_size=7)
    for number, text in enumerate(documents):
        (tmp_path / "texts" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "deep" / f"{number:03d}.txt").write_bytes(text.encode())
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "texts"):
        files = find_files([tmp_path / name], (".txt",))
        for part_bytes in (1, 100, 1000, 1 << 20):
            parts = plan_parts(files, part_bytes)
            assert [d.text for part in parts for d in part.documents("body", ())] == documents, (name, part_bytes)
            assert part_bytes > 1 or "jsonl." in name or len(parts) > 1


def test_special_tokens_spelled_out_in_text_stay_text_unless_asked_for(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if a web page that spells the end-of-document token can end a document, or the flag does nothing."""
    source = write_jsonl(tmp_path / "web.jsonl", [f"before{EOD}after"])
    for parse, ends in ((False, 1), (True, 2)):
        settings = TokenizeSettings("web", tokenizer_path, parse_special_tokens=parse)
        made = made_by([source], tmp_path / str(parse), settings, 1)
        [document] = documents_in(tmp_path / str(parse), made.shards)
        assert document.count(0) == ends
        decoded = Tokenizer.from_file(str(tokenizer_path)).decode(list(document[:-1]), skip_special_tokens=False)
        assert decoded.replace(" ", "").replace("Ġ", "") == f"before{EOD}after"


def test_a_large_vocabulary_is_written_as_int32(tmp_path: Path) -> None:
    """Fails if ids above 65,535 are wrapped into uint16."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(70_000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([EOD])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "web.jsonl", ["w1 w65535 w65536 w69999"])
    made = made_by([source], tmp_path / "out", TokenizeSettings("web", tmp_path / "tokenizer.json"), 1)
    assert documents_in(tmp_path / "out", made.shards) == [(1, 65_535, 65_536, 69_999, 70_000)]


def test_finished_output_is_reused_and_other_output_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if shards of other text or settings are taken for these or overwritten, or these are made again."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(50))
    out = tmp_path / "out"
    settings = TokenizeSettings("web", tokenizer_path, num_shards=3)
    made = made_by([source], out, settings, 1)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = made_by([source], out, settings, 2)
    assert again.reused
    assert (again.shards, again.documents, again.tokens) == (made.shards, made.documents, made.tokens)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match=r"web\.manifest\.json: these shards were made with other num_shards\."):
        tokenize([source], out, TokenizeSettings("web", tokenizer_path, num_shards=2), 1)
    write_jsonl(source, texts(50, seed=1))
    with pytest.raises(DataError, match=r"made with other inputs\."):
        tokenize([source], out, settings, 1)
    write_jsonl(source, texts(50))
    (out / "web_00001.bin").write_bytes((out / "web_00001.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"web_00001\.bin: \d+ bytes, but"):
        tokenize([source], out, settings, 1)
    (out / "web.manifest.json").unlink()
    with pytest.raises(DataError, match=r"web_00000\.idx exists, but not web\.manifest\.json"):
        tokenize([source], out, settings, 1)


@pytest.mark.parametrize("names", [("crawl_2024", "crawl"), ("crawl", "crawl_2024")])
def test_a_source_whose_name_begins_like_another_can_lie_beside_it(
    tmp_path: Path, tokenizer_path: Path, names: tuple[str, str]
) -> None:
    """Fails if shards of `crawl_2024` are taken for those of `crawl`: refused, or reported by verify as too many."""
    for name in names:
        made_by(
            [write_jsonl(tmp_path / "a.jsonl", texts(9))], tmp_path / "out", TokenizeSettings(name, tokenizer_path), 1
        )
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0


def test_a_job_killed_at_any_moment_ends_with_the_same_files(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if half a shard is ever visible, or the runs after kills, with other workers, give other files."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(300) * 60)
    base = ["--input", str(source), "--tokenizer", str(tokenizer_path), "--source", "web", "--shards", "12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert main(["tokenize", *base, "--workers", "1", "--output", str(whole)]) == 0
    seconds = time.monotonic() - began
    dice = random.Random(4)
    stopped = 0
    for number in range(5):
        arguments = [*base, "--workers", str(1 + number % 2), "--output", str(killed)]
        process = subprocess.Popen(
            [sys.executable, "-m", "data_tools", "tokenize", *arguments], stderr=subprocess.DEVNULL, process_group=0
        )
        deadline = time.monotonic() + 30
        while not (killed / ".web.work").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.random() * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        stopped += process.wait() == -signal.SIGKILL
        for index in killed.glob("*.idx"):
            assert index.read_bytes() == (whole / index.name).read_bytes()
            assert index.with_suffix(".bin").read_bytes() == (whole / index.name).with_suffix(".bin").read_bytes()
        assert (killed / "web.manifest.json").exists() is (not (killed / ".web.work").exists())
    assert stopped >= 2
    assert main(["tokenize", *base, "--workers", "2", "--output", str(killed)]) == 0
    assert files_of(whole) == files_of(killed)


def test_every_shard_and_the_source_say_what_they_hold(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if a fact in PREFIX.meta.json or NAME.manifest.json is not that of the files: runs start from them."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(200))
    made = made_by([source], tmp_path, TokenizeSettings("web", tokenizer_path, num_shards=2), 1)
    manifest = read_manifest(tmp_path / "web.manifest.json")
    assert manifest is not None
    assert [shard.name for shard in manifest.shards] == made.shards
    assert (manifest.tokens, manifest.documents, manifest.eod_id) == (made.tokens, made.documents, 0)
    for listed in manifest.shards:
        shard, meta = Shard(tmp_path / listed.name), read_meta(tmp_path / listed.name)
        assert meta is not None
        stream = shard.read(0, shard.num_tokens)
        assert (meta.tokens, meta.documents) == (len(stream), len(shard.document_ends()))
        assert (meta.max_id, meta.eod_count, meta.eod_terminated) == (stream.max(), (stream == 0).sum(), True)
        assert meta.tokenizer_hash == xxhash.xxh3_128(tokenizer_path.read_bytes()).hexdigest()
        for suffix, found in ((".bin", meta.bin_hash), (".idx", meta.idx_hash)):
            assert found == xxhash.xxh3_128((tmp_path / f"{listed.name}{suffix}").read_bytes()).hexdigest()
        Shard(tmp_path / listed.name, facts=listed, dtype=np.dtype(manifest.dtype)).read(0, 5)


def test_documents_can_be_chosen_by_what_else_is_said_of_them(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if --where keeps others, or conditions are joined by "or"."""
    records: list[dict[str, Any]] = [
        {"text": f"{lang} {quality}", "lang": lang, "quality": quality, "good": quality > 1, "rated": None}
        for lang in ("en", "de")
        for quality in (1, 2)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        for where, kept in (
            ((("lang", "en", True),), ["en 1", "en 2"]),
            ((("lang", "en", False), ("quality", "2", True)), ["de 2"]),
            ((("good", "true", True), ("rated", "null", True)), ["en 2", "de 2"]),
            ((("good", "true", False),), ["en 1", "de 1"]),
        ):
            [part] = plan_parts([tmp_path / name])
            assert [document.text for document in part.documents("text", where)] == kept
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 1: no key 'language'; it has text, lang, quality, .* \(--where\)"
    ):
        list(plan_parts([tmp_path / "a.jsonl"])[0].documents("text", (("language", "en", True),)))
    (tmp_path / "c.txt").write_text("whatever")
    with pytest.raises(DataError, match=r"c\.txt: plain text has no key 'lang'"):
        list(plan_parts([tmp_path / "c.txt"])[0].documents("text", (("lang", "en", True),)))


def test_two_jobs_at_the_same_work_do_not_meet(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if a job started twice by mistake does the work twice over the same files."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(20))
    settings = TokenizeSettings("web", tokenizer_path)
    (tmp_path / "out" / ".web.work").mkdir(parents=True)
    with lock(tmp_path / "out" / ".web.work" / "task_0.lock"), pytest.raises(DataError, match="is locked"):
        tokenize([source], tmp_path / "out", settings, 1)
    with lock(tmp_path / "gone" / "shards.lock", wait=True) as is_ours:
        assert not is_ours
    assert made_by([source], tmp_path / "out", settings, 1).documents > 0


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_files(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if the cluster's order of work shows in the shards."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(100))
    settings = TokenizeSettings("web", tokenizer_path, num_shards=2)
    tokenize([source], tmp_path / "ray", settings, 1, executor="ray")
    tokenize([source], tmp_path / "local", settings, 1)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


BAD_INPUTS = {
    "missing key": (
        "a.jsonl",
        b'{"text": "x"}\n{"body": "x", "id": 1}\n',
        r"a\.jsonl, line 2: no key 'text'; it has body, id",
    ),
    "not JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: no JSON object with a text"),
    "not a text": ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: .*got int"),
    "not UTF-8": ("a.txt", b"abc\xff", r"a\.txt: no UTF-8 at byte 3"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], r"a\.jsonl\.gz, after line .* damaged"),
    "cut zstd": (
        "a.jsonl.zst",
        zstandard.compress(os.urandom(3000).hex().encode())[:-9],
        "zst, after line 0: .* damaged",
    ),
    "no zstd": ("a.jsonl.zst", b"plain", r"a\.jsonl\.zst, after line 0: the compressed file is damaged"),
    "no Parquet": ("a.parquet", b"plain", r"a\.parquet: no readable Parquet file"),
    "unknown suffix": ("a.csv", b"x", r"a\.csv is none: documents are in files that end in .*\.jsonl"),
    "nothing in it": ("a.jsonl", b"\n", "No text in the 1 input files"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_with_file_and_line(
    tmp_path: Path, tokenizer_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if damaged input is skipped or cut without a word, or the user gets a traceback."""
    name, content, message = BAD_INPUTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokenize([tmp_path / name], tmp_path / "out", TokenizeSettings("web", tokenizer_path), 1)
    arguments = ["--input", str(tmp_path / name), "--tokenizer", str(tokenizer_path), "--workers", "1"]
    assert main(["tokenize", *arguments, "--output", str(tmp_path / "o"), "--source", "w"]) == 1
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.glob("o*/*.idx"))


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if the user has to guess what --text-key should be."""
    parquet.write_table(pyarrow.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; it has \['n', 'body'\]"):
        tokenize([tmp_path / "a.parquet"], tmp_path / "out", TokenizeSettings("web", tokenizer_path), 1)


def test_a_lone_surrogate_does_not_stop_the_run(tmp_path: Path, tokenizer_path: Path) -> None:
    """Fails if one broken escape in a web crawl ends a run of hours."""
    (tmp_path / "a.jsonl").write_text('{"text": "ok \\ud83d end \\ud83d\\ude42"}\n')
    [document] = read_documents(tmp_path / "a.jsonl", "text", ())
    assert document.text == "ok \ufffd end 🙂"


def test_a_tokenizer_without_the_end_token_is_refused_before_anything_is_written(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    """Fails if documents would run into each other."""
    source = write_jsonl(tmp_path / "web.jsonl", ["text"])
    with pytest.raises(ConfigError, match=r"no token '</s>'; .*: <\|endoftext\|>, <pad> \(--eod-token\)"):
        tokenize([source], tmp_path / "out", TokenizeSettings("web", tokenizer_path, eod_token="</s>"), 1)
    assert not (tmp_path / "out").exists()
