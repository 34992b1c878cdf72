"""Whatever happens to the bytes of a checkpoint, a run finds it, says which file, and goes on from the older one."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from nemotron_train.checkpoint.commit import COMMIT_FILE, REASON_FILE, DamagedCheckpoint, step_folder
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.run_data import open_run_data
from nemotron_train.engine.agreement import from_rank_zero
from nemotron_train.errors import CheckpointError
from tests.checkpoint.saved_runs import copy_run, digest, fill, filled_step, save_steps, tiny_config, trainer_of
from tests.engine.live import live_run
from tests.ranks import RankPool

PARTS = ("payload", "metadata", "commit")


def flip_bit(folder: Path, seed: int) -> str:
    """Flip one random bit of one random file; each part of a checkpoint is equally likely. Returns the file's name."""
    chance = random.Random(seed)
    names = {
        "payload": sorted(path.name for path in folder.glob("*.distcp")),
        "metadata": [".metadata", "common.pt", "metadata.json"],
        "commit": [COMMIT_FILE],
    }
    name = chance.choice(names[chance.choice(PARTS)])
    content = bytearray((folder / name).read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    (folder / name).write_bytes(content)
    return name


def part_of(name: str) -> str:
    """Return the part of a checkpoint that a file belongs to."""
    return "payload" if name.endswith(".distcp") else "commit" if name == COMMIT_FILE else "metadata"


def payload(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[0]


def truncate(folder: Path) -> str:
    payload(folder).write_bytes(payload(folder).read_bytes()[:-1])
    return payload(folder).name


def empty(folder: Path) -> str:
    payload(folder).write_bytes(b"")
    return payload(folder).name


def zeros(folder: Path) -> str:
    payload(folder).write_bytes(bytes(payload(folder).stat().st_size))
    return payload(folder).name


def delete(folder: Path) -> str:
    name = payload(folder).name
    payload(folder).unlink()
    return name


def delete_table_of_contents(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata"


def swap_two_files(folder: Path) -> str:
    first, second = sorted(folder.glob("*.distcp"))[:2]
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    return first.name


def swap_between_checkpoints(folder: Path) -> str:
    """The same file of the checkpoint before: the right size, the right shape, another step."""
    older = step_folder(folder.parent, 1) / payload(folder).name
    assert older.stat().st_size == payload(folder).stat().st_size
    shutil.copy(older, payload(folder))
    return payload(folder).name


def no_commit(folder: Path) -> str:
    (folder / COMMIT_FILE).unlink()
    return COMMIT_FILE


def garbage_commit(folder: Path) -> str:
    (folder / COMMIT_FILE).write_text("garbage")
    return COMMIT_FILE


def empty_commit(folder: Path) -> str:
    (folder / COMMIT_FILE).write_text("")
    return COMMIT_FILE


def commit_of_another_step(folder: Path) -> str:
    shutil.copy(step_folder(folder.parent, 1) / COMMIT_FILE, folder / COMMIT_FILE)
    return COMMIT_FILE


def another_step_in_its_place(folder: Path) -> str:
    """A whole checkpoint under the name of a newer one."""
    shutil.rmtree(folder)
    shutil.copytree(step_folder(folder.parent, 1), folder)
    return COMMIT_FILE


def file_in_its_place(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    return COMMIT_FILE


DAMAGES: tuple[Callable[[Path], str], ...] = (
    truncate, empty, zeros, delete, delete_table_of_contents, swap_two_files, swap_between_checkpoints, no_commit,
    garbage_commit, empty_commit, commit_of_another_step, another_step_in_its_place, file_in_its_place,
)  # fmt: skip


def not_found(config: RunConfig, damages: list[Callable[[Path], str] | int]) -> tuple[list[str], list[str]]:
    """Damage the newer of two checkpoints in each way (a number is the seed of a bit flip) and resume; returns what did
    not go as it should, and the file that each damage hit."""
    wrong, names = [], []
    run_dir = Path(config.run.dir)
    checkpoints, whole = run_dir / "checkpoints", run_dir / "whole"
    with live_run(config) as run:
        data = open_run_data(config)
        save_steps(run, data, [1, 2])
        from_rank_zero(lambda: checkpoints.rename(whole))
        fill(run, 1)
        older, newest = digest(run), step_folder(checkpoints, 2)

        def put_damaged(damage: Callable[[Path], str] | int) -> str:
            copy_run(whole, run_dir)
            return flip_bit(newest, damage) if isinstance(damage, int) else damage(newest)

        for damage in damages:
            name = from_rank_zero(partial(put_damaged, damage))
            names.append(name)
            fill(run, 99)  # nothing of this may be left
            progress = trainer_of(run, data).resume()
            aside = list(checkpoints.glob("step_000000002.damaged-*"))
            said = (aside[0] / REASON_FILE).read_text() if aside and aside[0].is_dir() else name
            if progress.step != 1 or digest(run) != older or len(aside) != 1 or name not in said:
                wrong.append(f"{damage}: {name}: step {progress.step}, {filled_step(run)}, {said!r}")
            dist.barrier()  # all ranks have looked
    return wrong, names


def test_damage_is_found_and_named_and_the_older_checkpoint_used(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a damaged checkpoint is loaded, ends the run, or is moved aside without the file's name; or if no bit is
    flipped in one of its parts."""
    wrong, names = ranks.run(not_found, 1, tiny_config(corpus, tmp_path), [*DAMAGES, *range(24)])[0]
    assert wrong == []
    assert {part_of(name) for name in names[len(DAMAGES) :]} == set(PARTS)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_all_found(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a single flipped bit anywhere in a checkpoint is loaded."""
    for start in range(0, 1000, 100):
        config = tiny_config(corpus, tmp_path / str(start))
        wrong, _ = ranks.run(not_found, 1, config, list(range(start, start + 100)))[0]
        assert wrong == []


def test_two_ranks_fall_back_together(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if the rank that does not read the damaged file goes on with it, or waits for ever."""
    tp2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
    config = tiny_config(corpus, tmp_path, parallel=tp2)
    assert [wrong for wrong, _ in ranks.run(not_found, 2, config, [swap_two_files, zeros])] == [[], []]


def resume_error(config: RunConfig) -> str:
    with live_run(config) as run:
        try:
            trainer_of(run).resume()
        except CheckpointError as error:
            return str(error)
    return "resumed"


def test_with_no_good_checkpoint_left_the_run_fails_with_every_reason(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Fails if a run whose checkpoints are all damaged begins anew, now or when it is started again."""
    config = tiny_config(corpus, tmp_path)
    ranks.run(save_and_damage_all, 1, config)
    for _ in range(2):
        error = ranks.run(resume_error, 1, config)[0]
        assert "No checkpoint in" in error
        assert ".metadata was altered" in error
        assert f"{COMMIT_FILE} was altered" in error


def save_and_damage_all(config: RunConfig) -> None:
    with live_run(config) as run:
        save_steps(run, open_run_data(config), [1, 2])
    for step, name in ((1, ".metadata"), (2, COMMIT_FILE)):
        path = step_folder(Path(config.run.dir) / "checkpoints", step) / name
        content = bytearray(path.read_bytes())
        last_digit = max(place for place, byte in enumerate(content) if byte in b"0123456789")
        content[last_digit] ^= 1  # another digit: a commit stays JSON, and only its hash can tell
        path.write_bytes(content)


def test_weights_read_in_one_process_are_checked_too(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if reading whole weights, as for an export, skips the hashes."""
    config = tiny_config(corpus, tmp_path)
    ranks.run(save_two, 1, config)
    folder = step_folder(tmp_path / "checkpoints", 2)
    read_whole_weights(folder)
    zeros(folder)
    with pytest.raises(DamagedCheckpoint, match=payload(folder).name):
        read_whole_weights(folder)


def save_two(config: RunConfig) -> None:
    with live_run(config) as run:
        save_steps(run, open_run_data(config), [1, 2])
