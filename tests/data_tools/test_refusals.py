"""Is what cannot work refused before anything is done, in the user's words? Oracle: the exit code, what is printed, and
the files that are there afterwards."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.__main__ import main
from data_tools.installed_text import Roots
from data_tools.source_record import TokenizeSettings
from data_tools.tokenize_corpus import tokenize
from nemotron_train.errors import ConfigError, DataError
from tests.data_tools.test_corpus import installation
from tests.data_tools.text import texts, write_jsonl


@pytest.mark.parametrize(("content", "message"), [('{"source": "w', "is damaged: "), ("[7]", "is damaged: no JSON")])
def test_a_damaged_record_of_what_was_begun_is_named(
    tmp_path: Path, tokenizer_path: Path, content: str, message: str
) -> None:
    """Fails if the user gets a traceback, or the work goes on as if it had been begun with the same settings."""
    work = tmp_path / "out" / ".web.work"
    work.mkdir(parents=True)
    (work / "made_from.json").write_text(content)
    source = write_jsonl(tmp_path / "web.jsonl", texts(5))
    with pytest.raises(DataError, match=rf"made_from\.json {message}"):
        tokenize([source], tmp_path / "out", TokenizeSettings("web", tokenizer_path), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "--seed -1 must be 0 or more"),
        ({"source": "a/b"}, "--source 'a/b' must be the name of a file"),
        ({"source": ""}, "--source '' must be the name of a file"),
        ({"source": "."}, "--source '.' must be the name of a file"),
        ({"source": ".."}, "--source '..' must be the name of a file"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(
    tmp_path: Path, tokenizer_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Fails if hours of tokenizing end in a traceback, leave a folder behind, or make shards without a name."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(5))
    settings = TokenizeSettings(**{"source": "web", "tokenizer": tokenizer_path, **changes})
    with pytest.raises(ConfigError, match=message):
        tokenize([source], tmp_path / "out", settings, 1)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def corpus(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A folder for `experiment=own_text`, as small as it may be."""
    folder = tmp_path / "corpus"
    settings = TokenizeSettings("web", tokenizer_path, num_shards=1)
    for split in ("train", "heldout"):
        tokenize([write_jsonl(tmp_path / "web.jsonl", texts(300))], folder / split, settings, 1)
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    return folder


@pytest.mark.parametrize("command", [["blend"], ["show", "--step", "1"]])
def test_keys_are_checked_as_for_a_run(corpus: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a value that training refuses ends in a traceback, or is answered for, by the tools that show data."""
    arguments = [*command, "experiment=own_text", f"data.path={corpus}", "data.max_epochs=1000"]
    assert main([*arguments, "train.global_batch_size=0"]) == 1
    assert "train.global_batch_size=0 must be at least 1" in capsys.readouterr().err
    assert main([*arguments, "parallel.tensor_parallel_size=0"]) == 1
    assert "world_size" not in capsys.readouterr().err  # which these tools do not take
    assert main([*arguments, "train.micro_batch_size=3"]) == 1  # a rule of several keys
    assert "is not a multiple of 3" in capsys.readouterr().err
    assert main(arguments) == 0


COMMANDS: dict[str, list[str]] = {
    "tokenize": ["--input", "{text}", "--tokenizer", "{corpus}", "--source", "w", "--workers", "1", "--output"],
    "merge": ["--input", "{corpus}/train/web_00000", "--output"],
    "split": ["--input", "{corpus}/train/web_00000", "--shards", "2", "--output"],
    "train-tokenizer": ["--input", "{text}", "--vocab-size", "300", "--output"],
    "stdlib-corpus": ["--output"],
    "blend": ["experiment=own_text", "data.path={corpus}", "--png"],
}


@pytest.fixture
def options(corpus: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a command, up to where its output goes."""
    python = installation(tmp_path / "python")
    monkeypatch.setattr(Roots, "of_this_python", lambda: python)
    return [option.format(corpus=corpus, text=tmp_path / "web.jsonl") for option in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the user gets a traceback, or has to guess which file it is about."""
    (tmp_path / "file").touch()
    assert main([command, *options, str(tmp_path / "file" / "below")]) == 1
    printed = capsys.readouterr().err
    assert f"error: {tmp_path / 'file'}" in printed
    assert "Not a directory" in printed or "File exists" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_names_with_brackets_are_printed_as_they_are(
    corpus: Path,
    tmp_path: Path,
    command: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a name is taken for rich's markup: a traceback when the work is done, or a name that is not there."""
    output = "made[/b]"  # b] in the folder made[; for rich, the end of what is bold
    monkeypatch.chdir(tmp_path)
    Path("made[").mkdir()  # which a picture does not make
    if command == "blend":
        source = "{name: 'web[/b]', prefixes: ['train/web_*'], eval_prefixes: ['heldout/web_*']}"
        phase = "{start_tokens: 0, weights: [{source: 'web[/b]', weight: 1}]}"
        options = ["experiment=own_text", f"data.path={corpus}", "data.max_epochs=1000"]
        options += [f"data.sources=[{source}]", f"data.phases=[{phase}]", "--png"]
    if command == "tokenize":
        options[options.index("w")] = "we[b]"
    assert main([command, *options, output]) == 0
    printed = "".join(capsys.readouterr())
    told = {"tokenize": ("made[/b]/we[b]: ", "tokenize we[b] "), "blend": ("web[/b]",), "stdlib-corpus": ("documents",)}
    assert all(text in printed for text in told.get(command, (output,)))
    assert list(tmp_path.glob("made[[]/b]*"))


def test_a_picture_that_cannot_be_written_leaves_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a folder's name ends in a traceback, or another file's name is blamed or stays."""
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for path, problem in (("folder", "Is a directory"), (".", "Is a directory"), ("nowhere/a.png", "No such file")):
        arguments = ["blend", "experiment=own_text", f"data.path={corpus}", "data.max_epochs=1000"]
        assert main([*arguments, "--png", str(tmp_path / path)]) == 1
        assert f"error: {tmp_path / path}: {problem}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_corpus_may_be_of_any_size_above_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a size that is no number of bytes ends in a traceback, or in a corpus of nothing."""
    python = installation(tmp_path / "python")
    monkeypatch.setattr(Roots, "of_this_python", lambda: python)
    output = tmp_path / "text"
    for size in ("nan", "-1", "0"):
        assert main(["stdlib-corpus", "--output", str(output), f"--max-mb={size}"]) == 1
        assert "must be above 0" in capsys.readouterr().err
    assert not output.exists()
    assert main(["stdlib-corpus", "--output", str(output), "--max-mb=inf"]) == 0
