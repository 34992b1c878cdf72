"""A folder in `checkpoint.resume` that is no checkpoint is refused, with the one that was meant, before ranks meet."""

from pathlib import Path

import pytest

from nemotron_train import train
from nemotron_train.checkpoint.commit import COMMIT_FILE, commit_folder, start_folder
from nemotron_train.checkpoint.resume import check_named_folder
from nemotron_train.config.schema import RunConfig
from nemotron_train.errors import ConfigError
from nemotron_train.platform.ranks import LaunchedRank
from tests.small_runs import small_config
from tests.small_runs_by_command import small_overrides


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 5 and 10, and a damaged one of step 15."""
    checkpoints = tmp_path / "runs" / "first" / "checkpoints"
    for step in (5, 10, 15):
        newest = commit_folder(
            start_folder(checkpoints, step), step=step, consumed_tokens=256 * step, skipped_steps=0, origin=None,
            model={}, config_fingerprint="", data_hash="", layout={}, versions={},
        )  # fmt: skip
    (newest / COMMIT_FILE).unlink()
    return checkpoints.parent


def config_of(resume: Path | str) -> RunConfig:
    return small_config(Path("unused"), Path("unused"), checkpoint={"resume": str(resume)})


@pytest.mark.parametrize(("inner", "kind"), [("", "a run folder"), ("checkpoints", "a folder of checkpoints")])
def test_a_folder_that_holds_checkpoints_is_refused_with_its_newest(run_dir: Path, inner: str, kind: str) -> None:
    """Fails if the message blames a missing COMMIT.json, names a damaged checkpoint, or moves one of another run."""
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(ConfigError) as refused:
        check_named_folder(config_of(run_dir / inner))
    newest = run_dir / "checkpoints" / "step_000000010"
    said = str(refused.value)
    assert said.startswith(f"checkpoint.resume={run_dir / inner} is {kind}; its newest checkpoint is {newest}.")
    assert sorted(run_dir.rglob("*")) == before
    check_named_folder(config_of(newest))


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_run_that_has_saved_nothing_is_called_that(tmp_path: Path, inner: str) -> None:
    """Fails if a folder with no complete checkpoint is offered as one, or its newest is `None`."""
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume=.* without a complete checkpoint\."):
        check_named_folder(config_of(tmp_path / inner))


def test_what_is_no_checkpoint_is_refused_before_anything_is_built(run_dir: Path, tmp_path: Path) -> None:
    """Fails if a file, some folder or a damaged checkpoint goes on to where ranks have met."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder", run_dir / "checkpoints" / "step_000000015"):
        with pytest.raises(ConfigError, match=r"^checkpoint\.resume=.* is not a complete checkpoint.* COMMIT\.json"):
            check_named_folder(config_of(path))


def test_a_path_that_cannot_be_followed_is_refused_by_its_key(tmp_path: Path) -> None:
    """Fails if a mistyped path is called a damaged checkpoint, or one below a file is called missing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume=.*/nowhere does not exist\."):
        check_named_folder(config_of(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume=.*/file/step cannot be read \(Not a directory\)\."):
        check_named_folder(config_of(tmp_path / "file" / "step"))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_words_are_not_looked_for_on_disk(resume: str) -> None:
    """Fails if `auto` or `never` is taken for a folder, which is not there."""
    check_named_folder(config_of(resume))


def test_the_front_door_looks_before_ranks_meet(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a wrong folder costs a start of all ranks, or a run folder is made for it."""
    monkeypatch.setattr(train, "process_groups", lambda *_, **__: pytest.fail("the ranks have met"))
    overrides = small_overrides(corpus, tmp_path / "run", steps=20)
    with pytest.raises(ConfigError, match="does not exist"):
        train.run([*overrides, f"checkpoint.resume={tmp_path / 'nowhere'}"], LaunchedRank(0, 1, 0))
    assert not (tmp_path / "run").exists()
