"""How does one shard become several? In constant memory, cut between documents."""

import argparse
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from data_tools.console import plain_console
from data_tools.shard_streams import document_start, open_checked, piece_of, write_pieces
from nemotron_train.data.shard_format import ShardLayout
from nemotron_train.errors import ConfigError


def split(prefix: Path, output: Path, *, shards: int | None = None, shard_tokens: int | None = None) -> list[Path]:
    """Write the documents of a shard as OUTPUT_00000, OUTPUT_00001, ..., in order.

    Args:
        shards: how many, of about equal tokens; or `shard_tokens`: a shard ends with the document that reaches them.

    Raises:
        ConfigError: there are fewer documents than shards, or a number is below 1.
    """
    if (shards or shard_tokens or 0) < 1:
        raise ConfigError(
            f"--shards {shards} and --shard-tokens {shard_tokens}: one of them must be given, at least 1."
        )
    layout = open_checked(prefix)
    wanted = shard_tokens or -(-layout.num_tokens // (shards or 1))
    ends = list(_cuts(layout, wanted, shards))
    if not ends or len(ends) != (shards or len(ends)):
        raise ConfigError(f"{prefix} gives {len(ends)} shards of whole documents, not {shards or 'any'} (--shards).")
    made = []
    for number, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        made.append(output.with_name(f"{output.name}_{number:05d}"))
        write_pieces(made[-1], [piece_of(layout, first, end)])
    return made


def _cuts(layout: ShardLayout, wanted: int, shards: int | None) -> Iterator[int]:
    """Yield the documents before which to cut; the last one is the end. Each is searched for in the index on disk."""
    documents, start, made = layout.num_boundaries - 1, 0, 0

    def tokens_before(document: int) -> int:
        return document_start(layout, document)[1] // layout.dtype.itemsize

    while start < documents:
        made += 1
        reach = made * wanted if shards is not None else tokens_before(start) + wanted
        end = bisect_left(range(documents), reach, lo=start + 1, key=tokens_before)
        start = documents if made == shards else end
        yield start


def run(arguments: argparse.Namespace) -> None:
    made = split(arguments.input, arguments.output, shards=arguments.shards, shard_tokens=arguments.shard_tokens)
    plain_console(stderr=True).print(f"{len(made)} shards, {made[0]} to {made[-1]}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="PREFIX", help="the shard to read")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="gets _00000, _00001, ...")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--shards", type=int, metavar="N", help="how many, of about equal size")
    size.add_argument("--shard-tokens", type=int, metavar="N", help="tokens of a shard, at least")
