"""Is a merged checkpoint the weighted mean of two, and are two different models refused?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron_train.checkpoint.commit import COMMIT_FILE, _commit_text, read_commit
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.__main__ import main
from tests.random_checkpoints import random_checkpoint

MODEL = ModelSection("M-M*", 32, 64, 4, 2, 8, 8, 8, 4, 8, vocab_size=96)


def merge(first: Path, second: Path, weight: float, run_dir: Path) -> int:
    return main(
        ["merge", f"--checkpoint={first}", f"--checkpoint={second}", f"--weight={weight}", f"--output={run_dir}"]
    )


@pytest.mark.parametrize(("weight", "dtype"), [(0.3, torch.float32), (0.9, torch.float32), (0.4, torch.bfloat16)])
def test_every_weight_is_the_weighted_mean(tmp_path: Path, weight: float, dtype: torch.dtype) -> None:
    """Fails if a parameter is left out, the share is the other one's, or the mean is rounded more than once."""
    first, second = (random_checkpoint(tmp_path / str(seed), MODEL, seed, dtype) for seed in (1, 2))
    assert merge(first, second, weight, tmp_path / "merged") == 0
    merged = read_whole_weights(tmp_path / "merged" / "checkpoints" / "step_000000000")
    theirs = read_whole_weights(second)
    for name, tensor in read_whole_weights(first).items():
        exact = (1 - weight) * tensor.double() + weight * theirs[name].double()
        assert merged[name].dtype == tensor.dtype
        ulp = 2.0**-7 if tensor.dtype == torch.bfloat16 else 2.0**-22  # float32: three roundings
        largest = torch.maximum(tensor.abs(), theirs[name].abs()).double()
        assert ((merged[name].double() - exact).abs() <= ulp * largest).all(), name
    assert read_commit(tmp_path / "merged" / "checkpoints" / "step_000000000").model == read_commit(first).model


def test_at_either_end_it_is_one_of_the_two(tmp_path: Path) -> None:
    """Fails if a share of 0 or 1 changes a bit."""
    pair = [random_checkpoint(tmp_path / str(seed), MODEL, seed) for seed in (1, 2)]
    for weight, checkpoint in enumerate(pair):
        assert merge(*pair, weight, tmp_path / f"merged{weight}") == 0
        merged = read_whole_weights(tmp_path / f"merged{weight}" / "checkpoints" / "step_000000000")
        for name, tensor in read_whole_weights(checkpoint).items():
            assert torch.equal(merged[name], tensor), name


def test_what_cannot_be_merged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if two models are mixed, a message does not name the keys with both values, or something is written."""
    first = random_checkpoint(tmp_path / "first", MODEL)
    other = random_checkpoint(tmp_path / "other", replace(MODEL, layer_pattern="M-M-", hidden_size=64))
    assert merge(first, other, 0.5, tmp_path / "merged") == 1
    said = capsys.readouterr().err
    assert "model.hidden_size: 32 and 64" in said
    assert "model.layer_pattern: 'M-M*' and 'M-M-'" in said
    assert merge(first, first, 1.5, tmp_path / "merged") == 1
    assert "--weight=1.5" in capsys.readouterr().err
    assert merge(first, first.parent, 0.5, tmp_path / "merged") == 1
    assert str(first.parent) in capsys.readouterr().err
    assert main(["merge", f"--checkpoint={first}", "--weight=0.5", f"--output={tmp_path / 'merged'}"]) == 1
    assert "given 1 times" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert merge(first, first, 0.5, tmp_path / "first") == 1
    assert f"{first} is there already" in capsys.readouterr().err


def test_a_checkpoint_of_before_a_key_was_known_merges_with_one_of_after(tmp_path: Path) -> None:
    """Fails if two checkpoints of one model are taken for two because one does not name the parts that it lacks."""
    first, second = (random_checkpoint(tmp_path / str(seed), MODEL, seed) for seed in (1, 2))
    commit = read_commit(first)
    older = replace(commit, model={key: value for key, value in commit.model.items() if key != "qkv_norm"})
    (first / COMMIT_FILE).write_text(_commit_text(older))
    assert merge(first, second, 0.5, tmp_path / "merged") == 0
