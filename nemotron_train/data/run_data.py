"""Everything a run reads, opened and checked before any process group starts."""

from dataclasses import dataclass

from nemotron_train.config.schema import RunConfig
from nemotron_train.data.blend import BlendPlan
from nemotron_train.data.loader import SampleReader
from nemotron_train.data.open_sources import build_plan, check_epochs, open_data
from nemotron_train.data.source import Source


@dataclass(frozen=True)
class RunData:
    blend: BlendPlan
    reader: SampleReader
    heldout: tuple[Source | None, ...]  # in the order of data.sources; None: this source has no held-out shards
    seq_length: int

    def fingerprint(self, train_tokens: int) -> str:
        """A hash of all samples of a run, the same on every rank that sees the same shards."""
        seq_length = self.seq_length
        return self.blend.past_hash(train_tokens // seq_length * seq_length)

    @property
    def has_heldout(self) -> bool:
        return any(source is not None for source in self.heldout)


def open_run_data(config: RunConfig) -> RunData:
    """Open the shards of a run and plan its samples.

    Raises:
        ConfigError: phases, weights or epochs are impossible with these sources.
        DataError: a shard or the tokenizer is missing or damaged.
    """
    opened = open_data(config.data, config.model.vocab_size, config.train.seq_length)
    blend = build_plan(config.data, opened.training, config.train.seq_length, config.run.seed)
    check_epochs(blend, config.train.train_tokens, config.data.max_epochs)
    return RunData(
        blend=blend,
        reader=SampleReader(blend, opened.training),
        heldout=opened.heldout,
        seq_length=config.train.seq_length,
    )
