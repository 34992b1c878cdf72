"""What can go wrong in the user's terms, and the exit code each kind of failure leaves behind.

Raise one of these for anything a user can cause or mend. The message says what is wrong, gives both values,
and names the key or file to change. A plain `assert` is for our own bugs only.
"""

EXIT_FAILED = 1  # any error below, or an unexpected exception
EXIT_REQUEUE = 85  # stopped by a signal after saving a checkpoint: start the same command again to go on


class NemotronTrainError(Exception):
    """Base of every error that is the user's to mend; shown without a traceback."""


class ConfigError(NemotronTrainError):
    """The asked configuration is impossible, or does not fit the machine or the data."""


class DataError(NemotronTrainError):
    """A shard, tokenizer or source on disk is missing, damaged, or does not match what was asked."""


class CheckpointError(NemotronTrainError):
    """A checkpoint cannot be written, read, or used with this configuration."""


class NumericsError(NemotronTrainError):
    """Training produced values (NaN, infinity) that it could not step over."""
