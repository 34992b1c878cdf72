"""Do conversions say what is wrong with a folder: which file, both values, what to do?"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from nemotron_train.config.schema import ModelSection, Norm, PositionEmbedding, QkvNorm
from nemotron_train.convert.__main__ import main
from nemotron_train.convert.export_hf import ExportRequest, export_hugging_face
from nemotron_train.convert.parity import check_shapes
from nemotron_train.errors import CheckpointError
from tests.random_checkpoints import random_checkpoint

MODEL = ModelSection("M-M*", 32, 64, 4, 2, 8, 8, 8, 4, 8, vocab_size=96)
FILE = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    request = ExportRequest(checkpoint=random_checkpoint(folder / "run", MODEL), output=folder / "model",
                            max_shard_bytes=10**9, tolerance=1e-4, skip_parity="not under test")  # fmt: skip
    export_hugging_face(request, Console(quiet=True))
    return folder / "model"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.layers.1.mixer.up_proj.weight"] = tensors["backbone.layers.1.mixer.up_proj.weight"][:32].clone()


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["config.json", "No such file", "--input"]),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    "another architecture": (
        lambda folder: change_config(folder, model_type="llama"),
        ["config.json", "model_type='llama'", "'nemotron_h'"],
    ),
    "a missing tensor": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop("backbone.layers.0.mixer.D")),
        ["missing are ['model.layers.0.mixer.D'] (1 in all)", "hybrid_override_pattern"],
    ),
    "a tensor too many": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update(extra=torch.ones(1))),
        ["without a place there are ['extra']"],
    ),
    "another shape": (
        lambda folder: change_tensors(folder, halve),
        [FILE, "layers.1.mixer.up_proj.weight", "(32, 32)", "(64, 32)", "config.json"],
    ),
    "integers": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update(extra=torch.ones(1, dtype=torch.int8))),
        ["extra", FILE, "'I8'", "BF16"],
    ),
    "a cut file": (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-4]), [FILE]),
    "a file that the index names": (lambda folder: (folder / FILE).unlink(), [FILE]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_imported_is_refused_whole(
    export: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    """Fails if half a model is imported, or the message leaves the reader to guess."""
    change, said = DAMAGES[damage]
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    change(folder)
    assert main(["import-hf", f"--input={folder}", f"--output={tmp_path / 'run'}"]) == 1
    message = capsys.readouterr().err
    assert [text for text in said if text not in message] == []
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_into_a_run_that_has_begun(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Fails if a checkpoint is replaced, or the message does not name it."""
    checkpoint = random_checkpoint(tmp_path / "run", MODEL)
    assert main(["import-hf", f"--input={export}", f"--output={tmp_path / 'run'}"]) == 1
    assert f"{checkpoint} is there already" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if the message does not name the folder and what is missing in it."""
    assert main(["export-hf", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'model'}"]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path) in message
    assert "COMMIT.json" in message


def test_a_model_that_is_no_nemotron_h_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a part is dropped without a word, or the message does not name all of them."""
    model = replace(
        MODEL, layer_pattern="*-", norm=Norm.layer, linear_bias=True, position_embedding=PositionEmbedding.rope,
        rope_base=500_000.0, qkv_norm=QkvNorm.qk, output_norm=True, attention_logit_scale=0.5, attention_logit_cap=50.0,
        layer_scale=0.1,
    )  # fmt: skip
    checkpoint, output = random_checkpoint(tmp_path / "run", model), tmp_path / "model"
    assert main(["export-hf", f"--checkpoint={checkpoint}", f"--output={output}"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "model.norm=layer, model.linear_bias=True, model.position_embedding=rope, model.rope_base=500000.0, "
        "model.qkv_norm=qk, model.output_norm=True, model.attention_logit_scale=0.5, model.attention_logit_cap=50.0, "
        "model.layer_scale=0.1"
    ) in message
    assert not output.exists()


def test_an_end_token_that_is_nobodys_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if --eod-token is ignored without a word, or something is written before it is looked up."""
    checkpoint, output = random_checkpoint(tmp_path / "run", MODEL), tmp_path / "hf" / "model"
    command = ["export-hf", f"--checkpoint={checkpoint}", f"--output={output}", "--eod-token=<eos>"]
    assert main(command) == 1
    assert "Give --tokenizer FILE too" in capsys.readouterr().err
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert main([*command, f"--tokenizer={tmp_path / 'tokenizer.json'}"]) == 1
    assert "tokenizer.json has no token '<eos>' (--eod-token)" in capsys.readouterr().err
    assert not output.parent.exists()


def test_shapes_are_compared_with_the_model_that_transformers_builds(export: Path, tmp_path: Path) -> None:
    """Fails if the check without memory passes a tensor that transformers would refuse, or one of another model."""
    assert check_shapes(export) == 29
    for name, change in {
        "shape": lambda folder: change_tensors(folder, halve),
        "config": lambda folder: change_config(folder, mamba_num_heads=16),
        "missing": lambda folder: change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight")),
    }.items():
        shutil.copytree(export, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"has the shape|missing are \['lm_head.weight'\]"):
            check_shapes(tmp_path / name)
