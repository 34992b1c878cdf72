"""Weights that live only in FP8 are stored as ranges of the master weights, and nobody who reads them can tell.

Only a GPU has such weights; here a run is told that its bfloat16 matrices are some. The tests of the same name under
`tests/run` have real ones.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemotron_train.checkpoint import fp8_weights
from nemotron_train.checkpoint.resume import checkpoints_folder
from nemotron_train.checkpoint.store import load_checkpoint, save_checkpoint
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import PrecisionFormat, RunConfig
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.runtime import Runtime
from nemotron_train.trainer import build_runtime
from tests.checkpoint.saved_runs import digest, progress_at
from tests.engine.live import live_groups, live_run
from tests.ranks import RankPool
from tests.small_runs import small_config

LAYOUTS = {
    "dp2": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
}


def config_of(run_dir: Path, layout: str) -> RunConfig:
    return small_config(run_dir, run_dir, model={"layer_pattern": "M*-M"}, parallel=LAYOUTS[layout],
                        precision={"format": PrecisionFormat.bf16})  # fmt: skip


def masters_of(run: Runtime) -> Iterator[torch.Tensor]:
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            yield from group["params"]


def two_runs(folder: Path, layout: str) -> Iterator[Runtime]:
    """Yield a run whose weights are as they are, and one whose matrices live in FP8, as far as checkpoints are told."""
    with live_groups(config_of(folder, layout)) as (platform, groups):
        for name, predicate in (("plain", lambda weight: False), ("masters", is_a_matrix)):
            fp8_weights.lives_in_fp8 = predicate
            yield build_runtime(plan_run(config_of(folder / name, layout), 2), platform, groups)


def save_as(folder: Path, layout: str) -> None:
    """Save one state twice: as it is, and as a run whose matrices live in FP8 does."""
    for run in two_runs(folder, layout):
        with torch.no_grad():
            for master in masters_of(run):
                master.mul_(1.234567)  # no bfloat16 number
        for part in run.optimizer.chained_optimizers:
            part._copy_main_params_to_model_params()
        for chunk in run.chunks:
            chunk.start_param_sync()
        if fp8_weights.lives_in_fp8 is is_a_matrix:
            for weight in filter(is_a_matrix, run.chunks[0].module.parameters()):
                weight.data.fill_(7.0)  # what ranks hold is not what is stored
        save_checkpoint(run, progress_at(1), "")


def is_a_matrix(weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and weight.dtype is torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_stored_is_the_rounded_master_weight(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """Fails if a range of a weight is missing, in another place or not rounded, or a packed one is cut elsewhere."""
    ranks.run(save_as, 2, tmp_path, layout)
    plain, masters = (read_whole_weights(folder_of(tmp_path / name, layout)) for name in ("plain", "masters"))
    assert plain.keys() == masters.keys()
    for name, weight in plain.items():
        assert masters[name].dtype is weight.dtype, name
        assert torch.equal(masters[name], weight), name


def folder_of(run_dir: Path, layout: str) -> Path:
    return next(checkpoints_folder(config_of(run_dir, layout)).glob("step_*"))


def load_both(folder: Path, layout: str) -> list[str]:
    digests = []
    for name, run in zip(("plain", "masters"), two_runs(folder, layout), strict=True):
        load_checkpoint(run, folder_of(folder / name, layout), lambda commit: None)
        digests.append(digest(run))
    return digests


def test_what_is_loaded_is_the_same(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a weight is not filled from what was read, or its master weight is another."""
    ranks.run(save_as, 2, tmp_path, "dp2")
    for first, second in ranks.run(load_both, 2, tmp_path, "dp2"):
        assert first == second


def take_over(folder: Path) -> list[bool]:
    """Load weights as a checkpoint without optimizer state has them; whether master weights are those."""
    fp8_weights.lives_in_fp8 = is_a_matrix
    with live_run(config_of(folder, "dp2")) as run:
        chunk = run.chunks[0].module
        given = {name: torch.full_like(weight, 0.5) for name, weight in chunk.named_parameters()}
        fp8_weights.take_as_masters(run.optimizer, chunk, given)
        return [
            bool((part._get_main_param_and_optimizer_states(weight)["param"] == 0.5).all()) == is_a_matrix(weight)
            for part in run.optimizer.chained_optimizers
            for bucket in fp8_weights.buckets_of(part)
            for weight in bucket["param_map"]
        ]


def test_weights_without_optimizer_state_become_the_master_weights(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a run that starts from weights alone begins with those that FP8 has rounded."""
    for found in ranks.run(take_over, 2, tmp_path):
        assert found
        assert all(found)
