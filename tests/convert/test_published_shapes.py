"""Narrow models with the patterns, heads and groups of the published ones, saved under several layouts, to Hugging Face
and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.load import RECIPES
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.__main__ import main
from nemotron_train.convert.parity import compare_logits
from tests.random_checkpoints import random_checkpoint, save_again
from tests.ranks import RankPool
from tests.small_runs import VOCAB, small_config

NARROW = {"hidden_size": 64, "ffn_hidden_size": 96, "attention_head_dim": 4, "mamba_state_dim": 12, "vocab_size": VOCAB}
MAMBA_HEAD_DIM = {"nemotron_h_8b": 4, "nemotron_nano_12b_v2": 5}  # as 64 to 80
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "tp2": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "tp2 pp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "sequence_parallel": True}),
}


def narrow(name: str) -> dict[str, Any]:
    """A published model's keys with other widths, and chunks that transformers' memory-hungry scan is quick with."""
    published = yaml.safe_load((RECIPES / "model" / f"{name}.yaml").read_text())
    return {**published, **NARROW, "mamba_head_dim": MAMBA_HEAD_DIM[name], "mamba_chunk_size": 16}


def test_the_narrow_models_keep_the_published_structure() -> None:
    """Fails if a recipe changes under the name that these tests give it."""
    models = [ModelSection(**narrow(name)) for name in MAMBA_HEAD_DIM]
    heads = [
        (model.num_attention_heads, model.num_query_groups, model.mamba_num_heads, model.mamba_num_groups)
        for model in models
    ]
    assert [len(model.layer_pattern) for model in models] == [52, 62]
    assert heads == [(32, 8, 128, 8), (40, 8, 128, 8)]


@pytest.mark.slow  # models of other shapes take this way by default: test_hugging_face.py
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAMBA_HEAD_DIM)
def test_there_and_back(ranks: RankPool, tmp_path: Path, name: str, layout: str) -> None:
    """Fails if a layout or a structure loses or moves a weight: logits differ by more than 1e-4 in float32, an import
    is not bitwise the checkpoint, or a second export not bitwise the first."""
    world_size, parallel = LAYOUTS[layout]
    config = small_config(tmp_path, tmp_path / "run", model=narrow(name), parallel=parallel)
    source = random_checkpoint(tmp_path / "alone", config.model)
    checkpoint, *_ = ranks.run(save_again, world_size, config, source)
    no_gate = "--skip-parity=compared below"
    assert main(["export-hf", f"--checkpoint={checkpoint}", f"--output={tmp_path / 'hf'}", no_gate]) == 0
    parity = compare_logits(checkpoint, tmp_path / "hf", 1e-4)
    assert parity.largest_difference <= 1e-4
    assert parity.largest_logit > 0.5, "logits that differ at all"

    assert main(["import-hf", f"--input={tmp_path / 'hf'}", f"--output={tmp_path / 'imported'}"]) == 0
    imported = tmp_path / "imported" / "checkpoints" / "step_000000000"
    after = read_whole_weights(imported)
    for key, tensor in read_whole_weights(source).items():
        assert torch.equal(tensor, after[key]), key
    assert main(["export-hf", f"--checkpoint={imported}", f"--output={tmp_path / 'again'}", no_gate]) == 0
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
