"""How is a `tokenizer.json` opened by who turns text into tokens and back? Training does neither, and imports none."""

from pathlib import Path

from tokenizers import Tokenizer

from nemotron_train.data.tokenizer_file import check_tokenizer
from nemotron_train.errors import DataError


def open_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Open a tokenizer for a model.

    Raises:
        DataError: the file is missing or no tokenizer.
        ConfigError: it has more ids than model.vocab_size.
    """
    check_tokenizer(path, vocab_size)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        raise DataError(f"{path} is no Hugging Face tokenizer.json: {error}.") from error
