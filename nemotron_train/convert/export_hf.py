"""`export-hf`: a checkpoint of ours -> a folder that transformers opens as NemotronHForCausalLM.

The folder gets its name only after it has been checked (`hf_weights.py`, `parity.py`); until then it is called
`NAME.unchecked`. Weights keep the precision they were trained in. One file of weights at a time is in memory; only
the comparison of logits needs the whole model.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.hf_config import check_is_nemotron_h, hugging_face_config, names_of
from nemotron_train.convert.hf_weights import HfWeights
from nemotron_train.convert.parity import check_shapes, compare_logits
from nemotron_train.data.open_tokenizer import open_tokenizer
from nemotron_train.data.tokenizer_file import token_id
from nemotron_train.errors import CheckpointError, ConfigError

DEFAULT_EOD = "<|endoftext|>"
# Of the comparison, for each weight: one model in float32, and the files it is loaded from.
_PARITY_BYTES_PER_WEIGHT = 8


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    checkpoint: Path
    output: Path
    max_shard_bytes: int
    tolerance: float
    tokenizer: Path | None = None  # tokenizer.json
    eod_token: str | None = None  # of that tokenizer, ends a document; None: DEFAULT_EOD if it has it
    max_length: int | None = None  # tokens
    skip_parity: str | None = None  # why the logits are not compared


def export_hugging_face(request: ExportRequest, console: Console) -> None:
    """Write, check, and only then give the folder its name.

    Raises:
        ConfigError: the model is no NemotronH, the output exists, the tokenizer does not fit, or the comparison does
            not fit into memory.
        CheckpointError: the checkpoint cannot be read, or the export is not the same model; it stays `.unchecked`.
    """
    model = ModelSection(**read_commit(request.checkpoint).model)  # type: ignore[arg-type]
    check_is_nemotron_h(model)
    weights = HfWeights(names_of(model), request.checkpoint)
    check_request(request, model, weights.num_elements)
    unchecked = request.output.with_name(f"{request.output.name}.unchecked")
    try:
        shutil.rmtree(unchecked, ignore_errors=True)
        unchecked.mkdir(parents=True)
        weights.write(unchecked, request.max_shard_bytes)
        write_descriptions(request, model, weights, unchecked)
    except OSError as error:
        raise CheckpointError(f"Cannot write {unchecked}: {error}") from error
    weights.check(unchecked)
    console.print(f"Wrote {weights.num_elements:,} weights; read back, each is the checkpoint's.")
    console.print(f"Names and shapes of all {check_shapes(unchecked):,} tensors are those that transformers expects.")
    if request.skip_parity is None:
        check_parity(request, unchecked, console)
    else:
        console.print(f"The logits were NOT compared: {request.skip_parity}")
    unchecked.rename(request.output)
    console.print(f"Exported to {request.output}" + ("." if request.tokenizer else ", without a tokenizer."))


def check_request(request: ExportRequest, model: ModelSection, num_weights: int) -> None:
    """Refuse what cannot end well before anything is written."""
    if request.output.exists():
        raise ConfigError(f"{request.output} exists already; nothing is overwritten. Choose another --output.")
    if request.tokenizer:
        open_tokenizer(request.tokenizer, model.vocab_size)
        if request.eod_token:
            token_id(request.tokenizer, request.eod_token, "--eod-token")
    elif request.eod_token:
        raise ConfigError(f"--eod-token={request.eod_token} is one of a tokenizer's tokens. Give --tokenizer FILE too.")
    needed, available = num_weights * _PARITY_BYTES_PER_WEIGHT, psutil.virtual_memory().available
    if request.skip_parity is None and needed > available:
        raise ConfigError(
            f"Comparing the logits of {num_weights:,} weights takes {needed / 1e9:.0f} GB of memory and "
            f"{available / 1e9:.0f} GB are free. Export on a larger machine, or with --skip-parity REASON."
        )


def check_parity(request: ExportRequest, unchecked: Path, console: Console) -> None:
    parity = compare_logits(request.checkpoint, unchecked, request.tolerance)
    if not parity.holds:
        raise CheckpointError(
            f"transformers computes something else from the export: {parity}. It was not given its name and is left "
            f"in {unchecked} for you to look at."
        )
    console.print(f"transformers computes the same: {parity}.")


def write_descriptions(request: ExportRequest, model: ModelSection, weights: HfWeights, folder: Path) -> None:
    """Write everything beside the weights: configuration, generation settings, tokenizer."""
    eos_token_id = None
    if request.tokenizer:
        shutil.copyfile(request.tokenizer, folder / "tokenizer.json")
        eod_token = request.eod_token or DEFAULT_EOD
        eos_token_id = open_tokenizer(request.tokenizer, model.vocab_size).token_to_id(eod_token)
        eos = {} if eos_token_id is None else {"eos_token": eod_token, "pad_token": eod_token}
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **eos})
    config = hugging_face_config(model, weights.main_dtype, eos_token_id=eos_token_id, max_length=request.max_length)
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
