"""`python -m data_tools COMMAND`: which command is asked for? Each command's own file has its options and its work."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from data_tools.console import plain_console
from nemotron_train.errors import EXIT_FAILED, DataError, NemotronTrainError

# The file of each command, and what it does. A file has add_options(parser) and run(arguments); only the one asked for
# is imported, because each of the processes that share its work imports what stands here anew.
COMMANDS = {
    "tokenize": ("tokenize_corpus", "turn text into .bin/.idx shards"),
    "merge": ("merge", "put shards together, in the order given"),
    "split": ("split", "cut a shard into several, between documents"),
    "verify": ("verify", "read shards whole and report all that is wrong with them"),
    "show": ("show", "show a document, or what training reads, as text"),
    "blend": ("blend_report", "show what an experiment reads: sources, weights, epochs"),
    "train-tokenizer": ("train_tokenizer", "learn a byte-level BPE vocabulary from text"),
    "stdlib-corpus": ("stdlib_corpus", "collect the text that comes with Python as a small corpus"),
    "ngram": ("ngram", "held-out loss of counting models, in nats per token"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors the user can mend are shown without a traceback."""
    asked = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="data_tools", description="Prepare text for training, without a GPU.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (file, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name in asked[:1]:
            module = import_module(f"data_tools.{file}")
            module.add_options(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(asked)
    try:
        _run(arguments)
    except NemotronTrainError as error:
        plain_console(stderr=True).print(f"error: {error}")
        return EXIT_FAILED
    return 0


def _run(arguments: argparse.Namespace) -> None:
    try:
        arguments.run(arguments)
    except OSError as error:  # of any tool's files: no such folder, no permission, a full disk
        raise DataError(f"{error.filename}: {error.strerror}." if error.filename else str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
