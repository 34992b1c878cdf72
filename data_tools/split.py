"""How does one shard become several? In constant memory, cut between documents."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from data_tools.shard_streams import Piece, lengths_of, open_checked, piece_of, write_pieces
from nemotron_train.data.shard_format import ShardLayout, read_array
from nemotron_train.errors import ConfigError


def split(prefix: Path, output: Path, *, shards: int | None = None, shard_tokens: int | None = None) -> list[Path]:
    """Write the documents of a shard as OUTPUT_00000, OUTPUT_00001, ..., in order.

    Args:
        shards: how many, of about equal tokens; or `shard_tokens`: a shard ends with the document that reaches them.

    Raises:
        ConfigError: there are fewer documents than shards.
    """
    layout = open_checked(prefix)
    wanted = shard_tokens or -(-layout.num_tokens // max(1, shards or 1))
    ends = list(_cuts(layout, wanted, shards))
    if shards is not None and len(ends) != shards:
        raise ConfigError(f"{prefix} gives {len(ends)} shards of whole documents, not {shards} (--shards).")
    made = []
    for number, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        made.append(output.with_name(f"{output.name}_{number:05d}"))
        write_pieces(made[-1], [piece_of(layout, first, end)])
    return made


def _cuts(layout: ShardLayout, wanted: int, shards: int | None) -> Iterator[int]:
    """Yield the documents after which to cut; the last one is the end."""
    documents = layout.num_boundaries - 1
    bounds = read_array(layout.idx_path, layout.boundaries_offset, "<i8", layout.num_boundaries)
    whole = Piece(layout, 0, documents, 0, layout.num_sequences, 0, 0)
    lengths = [np.cumsum(block, dtype=np.int64) for block in lengths_of(whole)]
    sums, total = [np.zeros(1, np.int64)], 0
    for block in lengths:
        sums.append(block + total)
        total = int(sums[-1][-1])
    ends = np.concatenate(sums)[bounds]  # tokens before each document
    start, made = 0, 0
    while start < documents:
        made += 1
        is_last = shards is not None and made == shards
        reach = made * wanted if shards is not None else int(ends[start]) + wanted
        end = documents if is_last else min(documents, max(start + 1, int(np.searchsorted(ends, reach))))
        yield end
        start = end


def run(arguments: argparse.Namespace) -> None:
    made = split(arguments.input, arguments.output, shards=arguments.shards, shard_tokens=arguments.shard_tokens)
    Console(stderr=True, soft_wrap=True).print(f"{len(made)} shards, {made[0]} to {made[-1]}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="PREFIX", help="the shard to read")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="gets _00000, _00001, ...")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--shards", type=int, metavar="N", help="how many, of about equal size")
    size.add_argument("--shard-tokens", type=int, metavar="N", help="tokens of a shard, at least")
