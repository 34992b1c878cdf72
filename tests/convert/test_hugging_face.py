"""Export and import of checkpoints that ranks have saved, opened by transformers itself."""

import json
import shutil
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHConfig, NemotronHForCausalLM

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.resume_gate import model_facts
from nemotron_train.checkpoint.whole_weights import read_reference_model, read_whole_weights
from nemotron_train.config import load
from nemotron_train.config.schema import Initialization, ModelSection, PrecisionFormat, RunConfig
from nemotron_train.convert.__main__ import TOLERANCE, main, parse_size, require
from nemotron_train.convert.export_hf import ExportRequest, export_hugging_face
from nemotron_train.convert.hf_config import hugging_face_config, model_section, names_of
from nemotron_train.convert.hf_weights import HfWeights
from nemotron_train.convert.import_hf import import_hugging_face
from nemotron_train.convert.new_run import recipe_keys
from nemotron_train.convert.parity import compare_logits, prompts
from nemotron_train.errors import CheckpointError, ConfigError
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes
from nemotron_train.plan.architecture_rules import BEYOND_NEMOTRON_H
from tests.random_checkpoints import random_checkpoint, save_again
from tests.ranks import RankPool
from tests.small_runs import VOCAB, small_config, train

STEPS = 2
END = "<|endoftext|>"

# name -> ranks, sections of the configuration
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}}),
    "tied": (2, {"parallel": {"pipeline_parallel_size": 2}, "model": {"tied_embeddings": True}}),
    "bf16": (1, {"precision": {"format": PrecisionFormat.bf16}, "model": {"layer_pattern": "*M-"}}),
}


@pytest.fixture(scope="module")
def checkpoints(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Let the ranks of each of RUNS load random weights and save them."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for name, (world_size, sections) in RUNS.items():
        config = short_config(corpus, folder / name, **sections)
        found[name], *_ = ranks.run(
            save_again, world_size, config, random_checkpoint(folder / f"{name} alone", config.model)
        )
    return found


def short_config(corpus: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    config = small_config(corpus, run_dir, steps=20, **sections)
    return replace(config, train=replace(config.train, train_tokens=STEPS * 256, eval_tokens=100),
                   lr=replace(config.lr, warmup_tokens=0, decay_tokens=256))  # fmt: skip


@pytest.fixture(scope="module")
def exports(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export each checkpoint through the command, in files so small that a model takes several."""
    folder = tmp_path_factory.mktemp("exported")
    for name, checkpoint in checkpoints.items():
        arguments = [f"--checkpoint={checkpoint}", f"--output={folder / name}", "--max-shard-size=30000"]
        assert main(["export-hf", *arguments]) == 0
    return {name: folder / name for name in checkpoints}


def import_into(folder: Path, run_dir: Path) -> Path:
    return import_hugging_face(folder, run_dir, Console(quiet=True))


def reference_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return read_reference_model(checkpoint, torch.float32)(tokens)


@pytest.mark.parametrize("name", RUNS)
def test_transformers_computes_the_logits_of_the_checkpoint(checkpoints: dict, exports: dict, name: str) -> None:
    """Fails if a weight, a size or a constant gets lost between the layout it was trained in and transformers."""
    model = AutoModelForCausalLM.from_pretrained(exports[name], dtype=torch.float32)
    assert type(model) is NemotronHForCausalLM
    for length in (3, 33, 140):
        tokens = torch.arange(2 * length).reshape(2, length) * 7 % VOCAB
        with torch.no_grad():
            theirs = model(tokens).logits
        torch.testing.assert_close(theirs, reference_logits(checkpoints[name], tokens), rtol=0, atol=1e-4)


def test_the_comparison_sees_what_is_there(checkpoints: dict, exports: dict) -> None:
    """Fails if the gate compares a model with itself: two programs agree to float32 digits, not exactly."""
    parity = compare_logits(checkpoints["tp2"], exports["tp2"], TOLERANCE)
    assert parity.holds
    assert 0 < parity.largest_difference < 1e-4
    assert parity.largest_logit > 0.05
    assert [tokens.shape[1] for tokens in prompts(VOCAB)] == [1, 17, 128, 150]


@pytest.mark.parametrize("weight", ["layers.0.mixer.dt_bias", "layers.3.mixer.k_proj.weight", "layers.1.norm.weight"])
def test_one_changed_value_is_refused(checkpoints: dict, exports: dict, tmp_path: Path, weight: str) -> None:
    """Fails if a damaged export passes the bitwise check, or one that matters passes the comparison of logits."""
    broken = tmp_path / "broken"
    shutil.copytree(exports["tp2"], broken)
    change_value(broken, f"backbone.{weight}", 1.0)
    with pytest.raises(CheckpointError, match=weight):
        weights_of(checkpoints["tp2"]).check(broken)
    assert not compare_logits(checkpoints["tp2"], broken, TOLERANCE).holds


def test_an_export_with_other_logits_does_not_get_its_name(checkpoints: dict, tmp_path: Path, capsys: Any) -> None:
    """Fails if the command ends well, or leaves a folder that looks finished, when logits differ by too much."""
    output = tmp_path / "model"
    assert main(["export-hf", f"--checkpoint={checkpoints['tp2']}", f"--output={output}", "--tolerance=0"]) == 1
    assert not output.exists()
    assert "largest difference of logits" in capsys.readouterr().err


def test_skipping_the_comparison_is_said(checkpoints: dict, tmp_path: Path, capsys: Any) -> None:
    """Fails if --skip-parity compares all the same (tolerance 0 would refuse), or is not mentioned."""
    output = tmp_path / "model"
    arguments = [f"--checkpoint={checkpoints['tp2']}", f"--output={output}", "--tolerance=0", "--skip-parity=too large"]
    assert main(["export-hf", *arguments]) == 0
    assert "NOT compared: too large" in capsys.readouterr().out
    assert main(["export-hf", *arguments]) == 1, "an existing folder is never overwritten"


def test_files_stay_below_the_size_asked_for(exports: dict) -> None:
    """Fails if --max-shard-size is ignored, or the index does not name every tensor's file."""
    index = json.loads((exports["tp2"] / "model.safetensors.index.json").read_text())
    files = sorted(exports["tp2"].glob("*.safetensors"))
    stored = {name: path.name for path in files for name in load_file(path)}
    assert len(files) > 2
    assert stored == index["weight_map"]
    total = 0
    for path in files:
        tensors = load_file(path).values()
        size = sum(tensor.nbytes for tensor in tensors)
        assert size <= 30000 or len(tensors) == 1
        total += size
    assert total == index["metadata"]["total_size"]


@pytest.mark.parametrize("name", RUNS)
def test_import_gives_back_the_weights_bit_by_bit(checkpoints: dict, exports: dict, tmp_path: Path, name: str) -> None:
    """Fails if a weight is rounded, lost or permuted on the way there and back, or the model is called another."""
    imported = import_into(exports[name], tmp_path / "run")
    before, after = read_whole_weights(checkpoints[name]), read_whole_weights(imported)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
    assert read_commit(imported).model == read_commit(checkpoints[name]).model
    output = tmp_path / "again"
    assert main(["export-hf", f"--checkpoint={imported}", f"--output={output}", "--max-shard-size=30000"]) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in exports[name].iterdir()
    }


def test_the_recipe_of_an_import_can_be_chosen_as_the_model(
    checkpoints: dict, exports: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if `model=NAME` does not take the file, or makes another model of it."""
    import_into(exports["tied"], tmp_path / "run")
    shutil.copytree(load.RECIPES, tmp_path / "recipes")
    shutil.copyfile(tmp_path / "run" / "model.yaml", tmp_path / "recipes" / "model" / "imported.yaml")
    monkeypatch.setattr(load, "RECIPES", tmp_path / "recipes")
    config = load.load_config(["experiment=own_text", "data.path=corpus", "model=imported"])
    assert model_facts(config.model) == read_commit(checkpoints["tied"]).model


@pytest.mark.parametrize("conversion", ["tp2 to fp32", "tp2 to bf16", "bf16 to bf16"])
def test_training_starts_from_an_import(
    ranks: RankPool, corpus: Path, checkpoints: dict, exports: dict, tmp_path: Path, conversion: str
) -> None:
    """Fails if a run in the imported folder starts from other weights, or from other master weights.

    Its learning rate is next to nothing: after two steps, which write the master weights back, the model is the same.
    """
    name, _, precision = conversion.split()
    import_into(exports[name], tmp_path / "run")
    sections = {"precision": {"format": PrecisionFormat(precision)}, "model": RUNS[name][1].get("model", {})}
    rates = {"peak": 1e-12, "min": 1e-12}
    ranks.run(train, 2, short_config(corpus, tmp_path / "run", lr=rates, run={"seed": 1234}, **sections))
    after = tmp_path / "run" / "checkpoints" / f"step_{STEPS:09d}"
    tokens = torch.arange(30)[None]
    expected = reference_logits(checkpoints[name], tokens)
    tolerance = 0.02 if conversion == "tp2 to bf16" else 1e-6  # the only one that rounds weights
    torch.testing.assert_close(reference_logits(after, tokens), expected, rtol=0, atol=tolerance)


def test_config_json_says_the_model_section() -> None:
    """Fails if a key of the model is not carried by config.json, or is read from another key than written."""
    for section in different_models():
        written = hugging_face_config(section, torch.float32)
        read = model_section(NemotronHConfig(**json.loads(json.dumps(written))))
        assert read == section
        assert ModelSection(**yaml.safe_load(yaml.safe_dump(recipe_keys(read)))) == read


def test_small_time_steps_are_not_raised() -> None:
    """Fails if transformers computes with its default floor of dt, which Megatron-Core has not."""
    section = next(different_models())
    ours = HybridModel(ReferenceSizes(**{field.name: getattr(section, field.name) for field in fields(ReferenceSizes)}))
    for name, parameter in ours.named_parameters():
        if name.endswith("dt_bias"):
            torch.nn.init.constant_(parameter, -12.0)  # dt = softplus(-12) = 6e-6; the default floor is 1e-3
        elif name.endswith("mixer.in_proj.weight"):
            parameter.data *= 20  # the state, not only the skip connection, reaches the logits
    theirs = NemotronHForCausalLM(NemotronHConfig(**hugging_face_config(section, torch.float32))).eval()
    theirs.load_state_dict(names_of(section).to_hugging_face(dict(ours.named_parameters())))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5)


def test_a_missing_package_is_named() -> None:
    """Fails if the command dies of an ImportError, or names packages that are there."""
    with pytest.raises(ConfigError, match=r"needs no_such_package, which.*nemotron-train\[hf\]"):
        require(("safetensors", "no_such_package"))


def test_sizes_have_units() -> None:
    """Fails if a unit is off, or a mistyped size is taken for another."""
    assert [parse_size(text) for text in ("5GB", "200MB", "7")] == [5_000_000_000, 200_000_000, 7]
    for text in ("5 GB", "0MB", "5G", "-1"):
        with pytest.raises(ArgumentTypeError, match="is not a size"):
            parse_size(text)


def different_models() -> Iterator[ModelSection]:
    """Yield models that differ from one another in every key that a NemotronH has."""
    model = ModelSection("M-M*", 32, 64, 4, 2, 8, 6, 10, 3, 5, vocab_size=96)
    yield model
    for field in fields(ModelSection):
        value: Any = getattr(model, field.name)
        if field.name in BEYOND_NEMOTRON_H:  # refused: tests/convert/test_refusals.py
            continue
        if field.name == "layer_pattern":
            yield replace(model, layer_pattern="*M-")
        elif isinstance(value, bool):
            yield replace(model, **{field.name: not value})  # type: ignore[arg-type]
        elif isinstance(value, int | float):
            yield replace(model, **{field.name: value * 2})  # type: ignore[arg-type]
        else:
            yield replace(model, initialization=Initialization.gpt)


def test_older_spellings_of_the_released_configurations_are_read() -> None:
    """Fails if attention_head_dim, which the first released models say for head_dim, is passed over."""
    written = hugging_face_config(next(different_models()), torch.float32)
    del written["head_dim"]
    assert model_section(NemotronHConfig(**{**written, "attention_head_dim": 8})).attention_head_dim == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hybrid_override_pattern": "ME*"}, "'E'"),
        ({"use_bias": True}, "use_bias"),
        ({"mlp_hidden_act": "silu"}, "silu"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused(change: dict, said: str) -> None:
    """Fails if experts, biases or another activation are dropped without a word."""
    written = hugging_face_config(next(different_models()), torch.float32)
    with pytest.raises(ConfigError, match=said):
        model_section(NemotronHConfig(**{**written, **change}))


def test_a_tied_model_with_another_head_is_refused(exports: dict, tmp_path: Path) -> None:
    """Fails if importing throws a trained head away."""
    broken = tmp_path / "broken"
    shutil.copytree(exports["tied"], broken)
    change_value(broken, "lm_head.weight", 1.0)
    with pytest.raises(CheckpointError, match="lm_head"):
        import_into(broken, tmp_path / "run")


def test_the_tokenizer_comes_along_and_generation_stops_at_its_end_token(checkpoints: dict, tmp_path: Path) -> None:
    """Fails if AutoTokenizer cannot open the export, or the end token is not the tokenizer's."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, END: 2}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    output = tmp_path / "model"
    request = ExportRequest(checkpoint=checkpoints["bf16"], output=output, max_shard_bytes=10**9, tolerance=1e-4,
                            tokenizer=tmp_path / "tokenizer.json", max_length=77)  # fmt: skip
    export_hugging_face(request, Console(quiet=True))
    opened = AutoTokenizer.from_pretrained(output)
    assert opened("b")["input_ids"] == [1]
    assert opened.eos_token_id == 2
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert model.config.max_position_embeddings == 77
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


def change_value(folder: Path, name: str, by: float) -> None:
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[1] += by
    save_file(tensors, file, metadata={"format": "pt"})


def weights_of(checkpoint: Path) -> HfWeights:
    return HfWeights(names_of(ModelSection(**read_commit(checkpoint).model)), checkpoint)  # type: ignore[arg-type]
