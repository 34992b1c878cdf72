"""Everything a run reads, opened and checked before any process group starts."""

from dataclasses import dataclass
from pathlib import Path

from nemotron_train.config.schema import DocumentBoundary, RunConfig
from nemotron_train.data.blend import BlendPlan
from nemotron_train.data.fim import FillInTheMiddle
from nemotron_train.data.loader import SampleReader
from nemotron_train.data.open_sources import build_plan, check_epochs, open_data
from nemotron_train.data.source import Source
from nemotron_train.data.tokenizer_file import token_id


@dataclass(frozen=True)
class RunData:
    blend: BlendPlan
    reader: SampleReader
    heldout: tuple[Source | None, ...]  # in the order of data.sources; None: this source has no held-out shards
    eod_id: int | None  # where it cuts samples into documents; None: documents are not told apart

    @property
    def has_heldout(self) -> bool:
        return any(source is not None for source in self.heldout)


def open_run_data(config: RunConfig) -> RunData:
    """Open the shards of a run and plan its samples.

    Raises:
        ConfigError: phases, weights or epochs are impossible with these sources.
        DataError: a shard or the tokenizer is missing or damaged.
    """
    data, tokenizer = config.data, Path(config.data.path) / config.data.tokenizer
    opened = open_data(config.data, config.model.vocab_size, config.train.seq_length)
    blend = build_plan(config.data, opened.training, config.train.seq_length, config.run.seed)
    check_epochs(blend, config.train.train_tokens, config.data.max_epochs)
    resets = data.document_boundary is DocumentBoundary.reset
    eod_id = token_id(tokenizer, data.eod_token, "data.eod_token") if resets else None
    return RunData(
        blend=blend,
        reader=SampleReader(blend, opened.training, _fill_in_the_middle(config)),
        heldout=opened.heldout,
        eod_id=eod_id,
    )


def _fill_in_the_middle(config: RunConfig) -> FillInTheMiddle | None:
    data, tokenizer = config.data, Path(config.data.path) / config.data.tokenizer
    if not data.fim_tokens:
        return None
    prefix, suffix, middle = (token_id(tokenizer, token, "data.fim_tokens") for token in data.fim_tokens)
    eod = token_id(tokenizer, data.eod_token, "data.eod_token")
    return FillInTheMiddle(eod, prefix, suffix, middle, data.fim_spm_rate, config.run.seed)
