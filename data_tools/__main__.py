"""`python -m data_tools COMMAND`: which command is asked for? Each command's own file has its options and its work."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from data_tools import blend_report, merge, ngram, show, split, stdlib_corpus, tokenize_corpus, train_tokenizer, verify
from nemotron_train.errors import EXIT_FAILED, NemotronTrainError

# Each has add_command(commands), which sets `run`.
COMMANDS = (tokenize_corpus, merge, split, verify, show, blend_report, train_tokenizer, stdlib_corpus, ngram)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors the user can mend are shown without a traceback."""
    parser = argparse.ArgumentParser(prog="data_tools", description="Prepare text for training, without a GPU.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except NemotronTrainError as error:
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {error}")
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
