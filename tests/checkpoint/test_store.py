"""Is what a checkpoint holds what Megatron-Core would store, and does every number survive any change of layout?"""

import random
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.store import load_checkpoint, save_checkpoint, sharded_state
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import Norm, PositionEmbedding, PrecisionFormat, QkvNorm, RunConfig
from nemotron_train.errors import CheckpointError
from nemotron_train.runtime import Progress
from nemotron_train.step import train_step
from tests.checkpoint.saved_runs import digest, fill
from tests.engine.live import Arrays, live_run, micro_batches, random_samples, weights_of
from tests.model.whole import join_ranks
from tests.precision.small_fp8 import fp8_config
from tests.ranks import RankPool
from tests.small_runs import small_config

# Megatron-Core 0.16.1: the sharded state of `MambaModel` with the specification of `mamba_layer_specs.py` (Transformer
# Engine layers), for the pattern "M*-"; packed rows as `MambaMixer.sharded_state_dict` splits them.
MODEL_KEYS = {
    "embedding.word_embeddings.weight",
    "decoder.layers.0.mixer.in_proj.layer_norm_weight",
    "decoder.layers.0.mixer.in_proj.weight.z",
    "decoder.layers.0.mixer.in_proj.weight.x",
    "decoder.layers.0.mixer.in_proj.weight.B",
    "decoder.layers.0.mixer.in_proj.weight.C",
    "decoder.layers.0.mixer.in_proj.weight.dt",
    "decoder.layers.0.mixer.conv1d.weight.x",
    "decoder.layers.0.mixer.conv1d.weight.B",
    "decoder.layers.0.mixer.conv1d.weight.C",
    "decoder.layers.0.mixer.conv1d.bias.x",
    "decoder.layers.0.mixer.conv1d.bias.B",
    "decoder.layers.0.mixer.conv1d.bias.C",
    "decoder.layers.0.mixer.dt_bias",
    "decoder.layers.0.mixer.A_log",
    "decoder.layers.0.mixer.D",
    "decoder.layers.0.mixer.norm.weight",
    "decoder.layers.0.mixer.out_proj.weight",
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.2.mlp.linear_fc1.weight",
    "decoder.layers.2.mlp.linear_fc2.weight",
    "decoder.final_norm.weight",
    "output_layer.weight",
}
PARTS_OF_OPTIMIZER = ("optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")

TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
FOUR_LAYERS = "MM*-"  # enough for two stages of two chunks


GPT: dict[str, Any] = dict(
    norm=Norm.layer, linear_bias=True, position_embedding=PositionEmbedding.learned, max_position_embeddings=40,
    qkv_norm=QkvNorm.qk, output_norm=True, layer_scale=0.5,
)  # fmt: skip


def config_of(run_dir: Path, parallel: Mapping[str, Any], pattern: str = "M*-", **model: Any) -> RunConfig:
    return small_config(Path("unused"), run_dir, model={"layer_pattern": pattern, **model}, parallel=dict(parallel))


def start_and_save(config: RunConfig, start: Path | None, steps: int) -> Arrays:
    """Load `start` if given, take steps, save; returns this rank's weights as saved."""
    with live_run(config) as run:
        first = 1 if start is None else load_checkpoint(run, start, lambda commit: None).step
        for step in range(first, first + steps):
            mine = micro_batches(random_samples(step, 8, config), 2, run.groups.dp.rank(), run.groups.dp.size())
            assert train_step(run, mine, consumed_tokens=step * 256).updated
        save_checkpoint(
            run, Progress(step=first + steps, consumed_tokens=256 * (first + steps), skipped_steps=2), data_hash="hash"
        )
        return weights_of(run)


def saved(run_dir: Path) -> Path:
    [folder] = (run_dir / "checkpoints").iterdir()
    return folder


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as torch's own reader sees it."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def four_ranks(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Arrays]]:
    """A checkpoint of TP 2 x PP 2 after two steps, and the weights that each rank held."""
    run_dir = tmp_path_factory.mktemp("four")
    return run_dir, ranks.run(start_and_save, 4, config_of(run_dir, {**TP2, **PP2}), None, 2)


def test_stored_keys_are_those_of_megatron_core(four_ranks: tuple[Path, list[Arrays]]) -> None:
    """Fails if Megatron-Core would not find a weight of ours, or we would not find one of its."""
    tensors = stored_tensors(saved(four_ranks[0]))
    assert {key for key in tensors if not key.startswith("optimizer.")} == MODEL_KEYS
    for part in PARTS_OF_OPTIMIZER:
        assert {key.removeprefix(part) for key in tensors if key.startswith(part)} == MODEL_KEYS


def test_a_commit_describes_the_run(four_ranks: tuple[Path, list[Arrays]]) -> None:
    """Fails if a resume would read another step, token count or model than was saved."""
    commit = read_commit(saved(four_ranks[0]))
    assert (commit.step, commit.consumed_tokens, commit.skipped_steps, commit.data_hash) == (3, 768, 2, "hash")
    assert commit.layout == {"world_size": 4, "tensor": 2, "context": 1, "pipeline": 2, "virtual_pipeline": 1}
    assert commit.model["layer_pattern"] == "M*-"
    assert torch.__version__.startswith(commit.versions["torch"])


def test_whole_weights_are_those_that_the_ranks_held(four_ranks: tuple[Path, list[Arrays]]) -> None:
    """Fails if reading without ranks puts the parts of a packed parameter in another order, or takes a moment for a
    weight."""
    run_dir, held = four_ranks
    expected = join_ranks(held, 2, config_of(run_dir, {}).model)
    whole = read_whole_weights(saved(run_dir))
    assert whole.keys() == expected.keys()
    assert all(np.array_equal(whole[name].numpy(), expected[name]) for name in expected)


def load_both_ways(config: RunConfig, folder: Path) -> list[str]:
    """Hashes of this rank's state: of another step, after Megatron-Core's `load` alone, and after ours."""
    found = []
    with live_run(config) as run:
        fill(run, 99)
        found.append(digest(run))
        loaded = dist_checkpointing.load(sharded_state(run, is_loading=True), str(folder))
        run.chunks[0].module.load_state_dict(loaded["model0"])
        run.optimizer.load_state_dict(loaded["optimizer"])
        found.append(digest(run))
        fill(run, 99)
        load_checkpoint(run, folder, lambda commit: None)
        found.append(digest(run))
    return found


def test_megatron_cores_own_load_reads_a_checkpoint(ranks: RankPool, four_ranks: tuple[Path, list[Arrays]]) -> None:
    """Fails if files, table of contents or optimizer shards of ours are no ordinary `torch_dist` checkpoint."""
    for before, theirs, ours in ranks.run(load_both_ways, 2, config_of(four_ranks[0], TP2), saved(four_ranks[0])):
        assert before != theirs == ours


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "tp2 pp2": (4, {**TP2, **PP2}),
    "tp2 dp2": (4, TP2),
    "pp2 vpp2": (2, {**PP2, "virtual_pipeline_size": 2}),
    "cp2": (2, CP2),
}


def walk_over_all_pairs(names: list[str], seed: int) -> list[str]:
    """A walk, starting and ending at the first name, that goes from every name to every other once (Hierholzer)."""
    chance = random.Random(seed)
    left = {name: chance.sample(others, len(others)) for name in names for others in [[o for o in names if o != name]]}
    path, walk = [names[0]], []
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            walk.append(path.pop())
    return walk[::-1]


def walk_through_layouts(
    ranks: RankPool, folder: Path, start: Path, walk: list[str], pattern: str = FOUR_LAYERS, **model: Any
) -> None:
    """Load and save under one layout after the other; nothing may change in any bit on the way."""
    before = stored_tensors(start)
    for part in PARTS_OF_OPTIMIZER:
        for key in (key for key in before if key.startswith(part)):
            assert before[key].isfinite().all(), key
            assert before[key].any(), f"{key} has nothing to lose"
    for number, name in enumerate(walk):
        world_size, parallel = LAYOUTS[name]
        ranks.run(start_and_save, world_size, config_of(folder / str(number), parallel, pattern, **model), start, 0)
        start = saved(folder / str(number))
        after = stored_tensors(start)
        assert after.keys() == before.keys(), name
        assert [key for key in before if not torch.equal(before[key], after[key])] == [], (number, name)


def first_checkpoint(ranks: RankPool, folder: Path, pattern: str = FOUR_LAYERS, **model: Any) -> Path:
    ranks.run(start_and_save, 1, config_of(folder, {}, pattern, **model), None, 2)
    return saved(folder)


def test_weights_and_moments_survive_changes_of_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a weight, master weight or moment comes back as another's, or changed in any bit, under another
    layout."""
    walk = random.Random(3).sample([*LAYOUTS][1:], len(LAYOUTS) - 1)
    walk_through_layouts(ranks, tmp_path, first_checkpoint(ranks, tmp_path / "first"), [*walk, "alone"])


@pytest.mark.slow
def test_weights_and_moments_survive_every_change_of_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if any layout cannot read what any other wrote, there or back, bit by bit."""
    walk = walk_over_all_pairs([*LAYOUTS], seed=5)
    assert len(set(pairwise(walk))) == len(LAYOUTS) * (len(LAYOUTS) - 1)
    walk_through_layouts(ranks, tmp_path, first_checkpoint(ranks, tmp_path / "first"), walk[1:])


def test_biases_norms_and_positions_survive_changes_of_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a parameter that only a GPT has is stored in another shape or place by another layout."""
    start = first_checkpoint(ranks, tmp_path / "first", "*-*-", **GPT)
    walk_through_layouts(ranks, tmp_path, start, ["tp2 pp2", "dp2", "tp2", "cp2", "pp2 vpp2", "alone"], "*-*-", **GPT)


def test_delayed_scaling_may_begin_and_end_with_any_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a run with FP8 state cannot go on from weights without it, or one without from weights with it, or a
    number is another then."""
    start, contents = None, []
    for number, precision in enumerate((PrecisionFormat.bf16, PrecisionFormat.fp8_delayed, PrecisionFormat.bf16)):
        config = fp8_config(Path("unused"), tmp_path / str(number), precision, steps=8)
        ranks.run(start_and_save, 1, config, start, 0)
        start = saved(tmp_path / str(number))
        contents.append(stored_tensors(start))
    for name, tensor in contents[0].items():
        assert torch.equal(contents[1][name], tensor), name
        assert torch.equal(contents[2][name], tensor), name


def save_without_state_of_a_layer(config: RunConfig) -> None:
    with live_run(config) as run:
        in_proj = next(iter(run.chunks[0].module.decoder.layers)).mixer.in_proj
        plain = {"get_extra_state": torch.nn.Module.get_extra_state}
        in_proj.__class__ = type("Stateless", (type(in_proj),), plain)
        save_checkpoint(run, Progress(step=1, consumed_tokens=256), data_hash="hash")


def scales_loaded_beside_a_norm_with_state(config: RunConfig, folder: Path) -> list[float]:
    """Load into a run whose last norm has FP8 state too; returns a layer's scales."""
    with live_run(config) as run:
        decoder = run.chunks[0].module.decoder
        norm = type(decoder.final_norm)
        state = {"get_extra_state": lambda self: torch.zeros(3, dtype=torch.uint8), "set_extra_state": lambda *_: None}
        decoder.final_norm.__class__ = type("NormWithState", (norm,), state)
        load_checkpoint(run, folder, lambda commit: None)
        return next(iter(decoder.layers)).mixer.in_proj.quantizers.scales.forward.scale_Q.tolist()


def test_the_emulations_checkpoint_lacks_the_state_of_transformer_engines_norms(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Fails if a run of delayed scaling cannot go from the CPU to a GPU because Transformer Engine keeps FP8 state for
    modules that quantise nothing, if the state of the others is left out then, or if one of them may lack it."""
    config = fp8_config(Path("unused"), tmp_path / "first", PrecisionFormat.fp8_delayed, steps=8)
    ranks.run(start_and_save, 1, config, None, 2)
    folder = saved(tmp_path / "first")
    (scales,) = ranks.run(scales_loaded_beside_a_norm_with_state, 1, config, folder)
    assert 1.0 not in scales[:2], "what a layer starts with"
    config = fp8_config(Path("unused"), tmp_path / "second", PrecisionFormat.fp8_delayed, steps=8)
    ranks.run(save_without_state_of_a_layer, 1, config)
    (said,) = ranks.run(load_errors, 1, config, [saved(tmp_path / "second")])
    assert "mixer.in_proj._extra_state" in said[0]


def settings_after_loading(config: RunConfig, folder: Path) -> list[tuple[bool | None, float, float, bool]]:
    """Load into a run whose AdamW has a setting that torch's lacks. Returns for each group: that setting, epsilon, the
    step, and whether the group's step is a whole number."""
    with live_run(config) as run:
        for group in run.optimizer.param_groups:
            group["bias_correction"], group["eps"] = True, 3e-7
        load_checkpoint(run, folder, lambda commit: None)
        (part,) = run.optimizer.chained_optimizers
        found = []
        for group in part.optimizer.param_groups:
            (step,) = {float(part.optimizer.state[parameter]["step"]) for parameter in group["params"]}
            found.append((group.get("bias_correction"), group["eps"], step, isinstance(group["step"], int)))
        return found


def test_a_checkpoint_brings_no_settings_of_the_optimizer(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a setting that only this machine's AdamW has is gone after loading, as Transformer Engine's
    `bias_correction` is from a checkpoint that torch's AdamW wrote, if one comes back with the checkpoint, or if the
    count of steps does not, as a whole number, without which Transformer Engine's kernel refuses to run."""
    ranks.run(start_and_save, 1, config_of(tmp_path / "first", {}), None, 2)
    (groups,) = ranks.run(settings_after_loading, 1, config_of(tmp_path, {}), saved(tmp_path / "first"))
    assert len(groups) > 1
    assert set(groups) == {(True, 3e-7, 2.0, True)}


def load_errors(config: RunConfig, folders: list[Path]) -> list[str]:
    """What loading each folder into this model says."""
    messages = []
    with live_run(config) as run:
        for folder in folders:
            try:
                load_checkpoint(run, folder, lambda commit: None)
            except CheckpointError as error:
                messages.append(str(error))
            else:
                messages.append("loaded")
    return messages


def test_a_checkpoint_of_another_model_or_in_pieces_is_an_error_in_words(
    ranks: RankPool, tmp_path: Path, four_ranks: tuple[Path, list[Arrays]]
) -> None:
    """Fails if weights of another shape are taken, missing layers stay at their first values, or the user sees a bug of
    ours."""
    folder = saved(four_ranks[0])
    longer = config_of(tmp_path, {}, pattern="M*-M")
    for said in ranks.run(load_errors, 2, replace(longer, parallel=config_of(tmp_path, TP2).parallel), [folder]):
        assert re.fullmatch(r"Cannot load .*decoder\.layers\.3\..*", said[0]), "one line, with the first key"
        assert len(said[0]) < 1000
    wider = replace(longer, model=replace(config_of(tmp_path, {}).model, ffn_hidden_size=128))
    assert "Cannot load" in ranks.run(load_errors, 1, wider, [folder])[0][0]
    same = config_of(tmp_path, {})
    assert ranks.run(load_errors, 1, same, [folder])[0] == ["loaded"]
