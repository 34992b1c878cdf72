"""What does one tensor-parallel rank hold of the model: a model of its own, with its heads, groups and MLP columns."""

from dataclasses import dataclass, replace

from nemotron_train.config.schema import ModelSection, RunConfig


def share_of_rank(model: ModelSection, tp_size: int) -> ModelSection:
    """Return the sizes of a rank's share; hidden size and vocabulary stay whole (see the callers)."""
    return replace(
        model,
        ffn_hidden_size=model.ffn_hidden_size // tp_size,
        num_attention_heads=model.num_attention_heads // tp_size,
        num_query_groups=model.num_query_groups // tp_size,
        mamba_num_heads=model.mamba_num_heads // tp_size,
        mamba_num_groups=model.mamba_num_groups // tp_size,
    )


def scan_share(config: RunConfig) -> ModelSection:
    """Return the sizes of a rank's share, with the Mamba heads and groups that it scans: with context parallelism, some
    of its tensor-parallel rank's (`model/head_shares.py`)."""
    share = share_of_rank(config.model, config.parallel.tensor_parallel_size)
    cp_size = config.parallel.context_parallel_size
    groups = max(1, share.mamba_num_groups // cp_size)  # ranks share one where there are fewer
    return replace(share, mamba_num_heads=share.mamba_num_heads // cp_size, mamba_num_groups=groups)


@dataclass(frozen=True)
class RankTokens:
    """Tokens of one micro-batch on one rank."""

    layer: int  # inside layers: whole samples, or their context-parallel part
    residual: int  # between layers: with sequence parallelism one tensor-parallel rank's part of those


def tokens_on_rank(config: RunConfig, seq_length: int) -> RankTokens:
    """Count the tokens of a micro-batch of samples of `seq_length`."""
    parallel = config.parallel
    tokens = seq_length * config.train.micro_batch_size // parallel.context_parallel_size
    return RankTokens(tokens, tokens // parallel.tensor_parallel_size if parallel.sequence_parallel else tokens)
