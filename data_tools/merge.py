"""How do several shards become one? In constant memory, in the order given."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_tools.console import plain_console
from data_tools.shard_streams import open_checked, piece_of, write_pieces
from nemotron_train.data.shard_meta import ShardMeta
from nemotron_train.errors import ConfigError


def merge(prefixes: Sequence[Path], output: Path) -> ShardMeta:
    """Write the documents of all shards, one shard after the other, as one."""
    if not prefixes:
        raise ConfigError("Nothing to merge: name shards with --input.")
    layouts = [open_checked(prefix) for prefix in prefixes]
    return write_pieces(output, [piece_of(layout, 0, layout.num_boundaries - 1) for layout in layouts])


def run(arguments: argparse.Namespace) -> None:
    meta = merge(arguments.input, arguments.output)
    plain_console(stderr=True).print(f"{arguments.output}: {meta.documents} documents, {meta.tokens} tokens")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="PREFIX", help="shards to read")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="the shard to write")
