"""Which folders count as checkpoints, and which one a run starts from?"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from nemotron_train.checkpoint.commit import (
    COMMIT_FILE,
    Commit,
    commit_folder,
    newest_checkpoint,
    read_commit,
    start_folder,
    step_folder,
)
from nemotron_train.checkpoint.hashes import StoredFile
from nemotron_train.checkpoint.resume import choose_checkpoint
from nemotron_train.config.schema import RunConfig
from nemotron_train.errors import CheckpointError, ConfigError
from tests.small_runs import small_config


def write_checkpoint(checkpoints: Path, step: int, origin: str | None = None) -> Path:
    """A checkpoint with two files, one in a folder of its own."""
    temporary = start_folder(checkpoints, step)
    (temporary / "part").mkdir()
    (temporary / "part" / "weights").write_bytes(b"w" * min(step, 1_000))
    (temporary / "metadata").write_bytes(b"m" * 7)
    return commit_folder(
        temporary, step=step, consumed_tokens=256 * step, skipped_steps=1, origin=origin, model={"hidden_size": 8},
        config_fingerprint="f", data_hash="d", layout={"tensor": 2}, versions={"torch": "2"},
    )  # fmt: skip


def stored(content: bytes) -> StoredFile:
    return StoredFile(len(content), xxhash.xxh3_128_hexdigest(content))


def config_of(run_dir: Path, resume: str = "auto") -> RunConfig:
    return small_config(Path("unused"), run_dir, checkpoint={"resume": resume})


def test_a_commit_says_what_was_saved_and_lists_every_file(tmp_path: Path) -> None:
    """Fails if a fact is lost on the way through COMMIT.json, or a file is not watched over."""
    folder = write_checkpoint(tmp_path, 100)
    assert folder == tmp_path / "step_000000100"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000100"]
    assert read_commit(folder) == Commit(
        step=100, consumed_tokens=25_600, skipped_steps=1, origin=None, model={"hidden_size": 8},
        config_fingerprint="f",
        data_hash="d", layout={"tensor": 2}, versions={"torch": "2"},
        files={"metadata": stored(b"m" * 7), "part/weights": stored(b"w" * 100)},
    )  # fmt: skip


def without_commit(folder: Path) -> None:
    (folder / COMMIT_FILE).unlink()


def garbage(folder: Path) -> None:
    (folder / COMMIT_FILE).write_text('{"step": 20, "fil')


def no_object(folder: Path) -> None:
    (folder / COMMIT_FILE).write_text("[]")


def field_missing(folder: Path) -> None:
    facts = json.loads((folder / COMMIT_FILE).read_text())
    del facts["data_hash"]
    (folder / COMMIT_FILE).write_text(json.dumps(facts))


def not_utf8(folder: Path) -> None:
    (folder / COMMIT_FILE).write_bytes(b"\xff\xfe\x00")


def empty_commit(folder: Path) -> None:
    (folder / COMMIT_FILE).write_bytes(b"")


def file_missing(folder: Path) -> None:
    (folder / "part" / "weights").unlink()


def file_short(folder: Path) -> None:
    (folder / "part" / "weights").write_bytes(b"w" * 19)


def file_long(folder: Path) -> None:
    (folder / "metadata").write_bytes(b"m" * 8)


def file_is_a_folder(folder: Path) -> None:
    (folder / "metadata").unlink()
    (folder / "metadata").mkdir()


DAMAGES: dict[Callable[[Path], None], str] = {
    without_commit: "is not a complete checkpoint: COMMIT.json",
    garbage: "is not a complete checkpoint: COMMIT.json",
    no_object: "is not a complete checkpoint: COMMIT.json",
    field_missing: "data_hash",
    not_utf8: "is not a complete checkpoint: COMMIT.json",
    empty_commit: "is not a complete checkpoint: COMMIT.json",
    file_missing: "weights should have 20 bytes and has none",
    file_short: "weights should have 20 bytes and has 19",
    file_long: "metadata should have 7 bytes and has 8",
    file_is_a_folder: "metadata should have 7 bytes and has none",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    """Fails if an incomplete checkpoint is loaded, ends the run although an older one is good, or is passed over in
    silence."""
    checkpoints = tmp_path / "checkpoints"
    for step in (9, 10, 20):
        write_checkpoint(checkpoints, step)
    damage(step_folder(checkpoints, 20))
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        read_commit(step_folder(checkpoints, 20))
    newest, passed_over = newest_checkpoint(checkpoints)
    assert newest == step_folder(checkpoints, 10)
    assert len(passed_over) == 1
    assert DAMAGES[damage] in passed_over[0]
    assert "step_000000020" in passed_over[0]
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(config_of(tmp_path)) == newest
    assert "step_000000020" in caplog.text


def test_an_interrupted_save_is_no_checkpoint_and_does_not_block_the_next(tmp_path: Path) -> None:
    """Fails if a temporary folder counts, blocks the save of the same step, or lends its files to it."""
    write_checkpoint(tmp_path, 10)
    torn = start_folder(tmp_path, 20)
    (torn / "old_half").write_bytes(b"x")
    (torn / COMMIT_FILE).write_text("{}")
    assert newest_checkpoint(tmp_path) == (step_folder(tmp_path, 10), [])
    assert "old_half" not in read_commit(write_checkpoint(tmp_path, 20)).files
    assert newest_checkpoint(tmp_path) == (step_folder(tmp_path, 20), [])


def test_every_byte_of_a_commit_counts(tmp_path: Path) -> None:
    """Fails if a single flipped bit in COMMIT.json, white space and the hash itself included, goes unnoticed."""
    path = write_checkpoint(tmp_path, 10) / COMMIT_FILE
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=COMMIT_FILE):
            read_commit(path.parent)
    path.write_bytes(content)
    assert read_commit(path.parent).step == 10


def test_a_file_that_another_run_put_there_is_not_replaced(tmp_path: Path) -> None:
    """Fails if the rename at the end overwrites a folder that appeared while the checkpoint was written."""
    temporary = start_folder(tmp_path, 10)
    step_folder(tmp_path, 10).mkdir()
    with pytest.raises(CheckpointError, match="never overwritten"):
        commit_folder(temporary, step=10, consumed_tokens=0, skipped_steps=0, origin=None, model={},
                      config_fingerprint="", data_hash="", layout={}, versions={})  # fmt: skip


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """Fails if steps are compared as text, or by when they were written; other folders do not matter."""
    for step in (30, 7, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step_000000200.moved").mkdir()
    (tmp_path / "step_abc").mkdir()
    assert newest_checkpoint(tmp_path) == (step_folder(tmp_path, 100), [])
    write_checkpoint(tmp_path, 999_999_999)
    write_checkpoint(tmp_path, 1_000_000_000)  # one digit more than the names are padded to
    assert newest_checkpoint(tmp_path)[0] == step_folder(tmp_path, 1_000_000_000)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    """Fails if a second save of a step replaces, or merges into, the first one, whole or not."""
    folder = write_checkpoint(tmp_path, 10)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="step_000000010 exists already"):
        start_folder(tmp_path, 10)
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_folder_is_moved_aside_not_lost(tmp_path: Path) -> None:
    """Fails if a run that fell back to an older checkpoint cannot save the damaged one's step again, or deletes it."""
    without_commit(write_checkpoint(tmp_path, 10))
    start_folder(tmp_path, 10)
    (kept,) = tmp_path.glob("step_000000010.damaged-*")
    assert (kept / "metadata").read_bytes() == b"m" * 7
    assert newest_checkpoint(tmp_path) == (None, [])


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """Fails if a run.dir that is a file is reported as a bug."""
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Cannot make .*run\.dir"):
        start_folder(tmp_path / "checkpoints", 1)


def test_resume_auto_starts_anew_only_where_there_is_nothing(tmp_path: Path) -> None:
    """Fails if a run whose checkpoints are all damaged begins anew without a word."""
    assert choose_checkpoint(config_of(tmp_path)) is None
    file_short(write_checkpoint(tmp_path / "checkpoints", 20))
    with pytest.raises(CheckpointError, match=r"(?s)No checkpoint in .* is good.*weights should have 20 bytes"):
        choose_checkpoint(config_of(tmp_path))


def test_resume_never_refuses_a_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    """Fails if `never` goes on from a checkpoint, or trains over it."""
    assert choose_checkpoint(config_of(tmp_path, "never")) is None
    write_checkpoint(tmp_path / "checkpoints", 20)
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=never.*step_000000020"):
        choose_checkpoint(config_of(tmp_path, "never"))


def test_a_named_folder_is_where_a_new_run_starts(tmp_path: Path) -> None:
    """Fails if another checkpoint than the named one is taken, or a damaged one passes."""
    named = write_checkpoint(tmp_path / "elsewhere", 10)
    assert choose_checkpoint(config_of(tmp_path, str(named))) == named
    file_missing(named)
    with pytest.raises(CheckpointError, match="should have 10 bytes and has none"):
        choose_checkpoint(config_of(tmp_path, str(named)))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        choose_checkpoint(config_of(tmp_path, str(tmp_path / "nowhere")))


def test_started_again_a_run_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    """Fails if the same command begins anew at the named folder, rewinds to overwrite, or takes another run."""
    named = write_checkpoint(tmp_path / "elsewhere", 10)
    older = write_checkpoint(tmp_path / "checkpoints", 15, str(named))
    newest = write_checkpoint(tmp_path / "checkpoints", 20, str(named))
    assert choose_checkpoint(config_of(tmp_path, str(named))) == newest
    assert choose_checkpoint(config_of(tmp_path, str(newest))) == newest
    with pytest.raises(ConfigError, match=r"step_000000015, but .*step_000000020 is newer"):
        choose_checkpoint(config_of(tmp_path, str(older)))
    other = write_checkpoint(tmp_path / "elsewhere", 12)
    with pytest.raises(ConfigError, match=r"step_000000012, but .* started from .*step_000000010"):
        choose_checkpoint(config_of(tmp_path, str(other)))
