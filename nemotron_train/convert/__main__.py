"""`python -m nemotron_train.convert export-hf | import-hf | import-megatron | merge`: models to and from Hugging Face,
from Megatron-Core, and merged ones.

What needs transformers and safetensors, which training does not, is loaded only once both are known to be there.
"""

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nemotron_train.config.load import load_config
from nemotron_train.errors import EXIT_FAILED, ConfigError, NemotronTrainError

OPTIONAL_PACKAGES = ("transformers", "safetensors")
UNITS = {"": 1, "MB": 10**6, "GB": 10**9}
# Both programs compute in float32, in another order: a hybrid of eight layers differs by 1e-7 of its largest logit, and
# the difference grows about with the number of layers. A weight in the wrong place changes whole logits.
TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors the user can mend are shown without a traceback."""
    arguments = build_parser().parse_args(argv)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    try:
        arguments.run(arguments, console)
    except NemotronTrainError as error:
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False).print(
            f"{type(error).__name__}: {error}"
        )
        return EXIT_FAILED
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemotron-convert", description="Take models to and from other formats, and merge them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_export(commands.add_parser("export-hf", help="a checkpoint becomes a folder for transformers"))
    add_import(commands.add_parser("import-hf", help="such a folder becomes a checkpoint to train from"))
    megatron = "a checkpoint of Megatron-Core's hybrid model becomes one to train from"
    add_import_megatron(commands.add_parser("import-megatron", help=megatron))
    add_merge(commands.add_parser("merge", help="two checkpoints of one model become one, weight by weight"))
    return parser


def add_export(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN_DIR/checkpoints/step_..., of any layout")
    option("--output", type=Path, required=True, metavar="DIR", help="the new folder; must not exist")
    option("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to put beside the model")
    eod_token = "of that tokenizer, ends a document (default: <|endoftext|> if it has it)"
    option("--eod-token", metavar="TOKEN", help=eod_token)
    max_length = "max_position_embeddings, which serving programs read; the model itself has no limit"
    option("--max-length", type=int, metavar="TOKENS", help=max_length)
    shard_size = "largest file of weights (default: %(default)s)"
    option("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help=shard_size)
    tolerance = "largest difference of logits, as a share of the largest logit (default: %(default)s)"
    option("--tolerance", type=float, default=TOLERANCE, metavar="SHARE", help=tolerance)
    skip_parity = "do not compare logits with transformers, e.g. because the model is too large for this machine"
    option("--skip-parity", metavar="REASON", help=skip_parity)
    parser.set_defaults(run=run_export)


def add_import(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--input", type=Path, required=True, metavar="DIR", help="with config.json and .safetensors files")
    option("--output", type=Path, required=True, metavar="RUN_DIR", help="a run folder without checkpoints")
    parser.set_defaults(run=run_import)


def add_import_megatron(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--input", type=Path, required=True, metavar="DIR", help="with .metadata and .distcp files (torch_dist)")
    option("--output", type=Path, required=True, metavar="RUN_DIR", help="a run folder without checkpoints")
    option("overrides", nargs="+", metavar="model=NAME", help="its recipe, and model.KEY=VALUE for what differs")
    parser.set_defaults(run=run_import_megatron)


def add_merge(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    checkpoint = "RUN_DIR/checkpoints/step_..., of any layout; given twice"
    option("--checkpoint", type=Path, action="append", required=True, metavar="DIR", help=checkpoint)
    option("--weight", type=float, required=True, metavar="SHARE", help="of the second checkpoint, from 0 to 1")
    option("--output", type=Path, required=True, metavar="RUN_DIR", help="a run folder without checkpoints")
    parser.set_defaults(run=run_merge)


def run_export(arguments: argparse.Namespace, console: Console) -> None:
    require(OPTIONAL_PACKAGES)
    export_hf = importlib.import_module("nemotron_train.convert.export_hf")
    request = export_hf.ExportRequest(
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        tokenizer=arguments.tokenizer,
        eod_token=arguments.eod_token,
        max_length=arguments.max_length,
        max_shard_bytes=arguments.max_shard_size,
        tolerance=arguments.tolerance,
        skip_parity=arguments.skip_parity,
    )
    export_hf.export_hugging_face(request, console)


def run_import(arguments: argparse.Namespace, console: Console) -> None:
    require(OPTIONAL_PACKAGES)
    import_hf = importlib.import_module("nemotron_train.convert.import_hf")
    import_hf.import_hugging_face(arguments.input, arguments.output, console)


def run_import_megatron(arguments: argparse.Namespace, console: Console) -> None:
    others = [override for override in arguments.overrides if not override.startswith(("model=", "model."))]
    if others:
        raise ConfigError(f"import-megatron takes model=NAME and model.KEY=VALUE, not {' '.join(others)}.")
    model = load_config(["experiment=own_text", *arguments.overrides]).model
    import_megatron = importlib.import_module("nemotron_train.convert.import_megatron")
    import_megatron.import_megatron(arguments.input, model, arguments.output, console)


def run_merge(arguments: argparse.Namespace, console: Console) -> None:
    if len(arguments.checkpoint) != 2:
        raise ConfigError(f"merge takes two checkpoints; --checkpoint was given {len(arguments.checkpoint)} times.")
    merge = importlib.import_module("nemotron_train.convert.merge")
    merge.merge_checkpoints(*arguments.checkpoint, arguments.weight, arguments.output, console)


def require(packages: Sequence[str]) -> None:
    """Raise ConfigError if a package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"Converting to and from Hugging Face's format needs {' and '.join(missing)}, which training does not. "
            "Install: pip install 'nemotron-train[hf]'"
        )


def parse_size(text: str) -> int:
    """Return bytes of `5GB`, `200MB` or a plain number."""
    match = re.fullmatch(r"(\d+)(MB|GB|)", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 200MB, or a number of bytes")
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(main())
