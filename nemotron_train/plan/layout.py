"""Who is where: the place of every rank in the tensor, context, data and pipeline axes.

The order is Megatron-Core's `tp-cp-ep-dp-pp` (no expert axis here): ranks of one tensor-parallel group are neighbours,
so they sit in one node; pipeline stages, which talk least, are farthest apart.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import ParallelSection


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's index along every axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """How ranks are dealt to the axes. `plan.rules` has proved that the world size divides before one is built."""

    world_size: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1

    @property
    def data(self) -> int:
        """Return the number of model replicas: data parallelism takes what is left."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def num_model_chunks(self) -> int:
        return self.pipeline * self.virtual_pipeline

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return where a global rank stands."""
        rest, tp = divmod(rank, self.tensor)
        rest, cp = divmod(rest, self.context)
        pp, dp = divmod(rest, self.data)
        return RankCoordinates(tp=tp, cp=cp, dp=dp, pp=pp)


def ranks_per_replica(parallel: ParallelSection) -> int:
    """Return the ranks that hold one copy of the model."""
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size


def plan_layout(parallel: ParallelSection, world_size: int) -> Layout:
    """Deal `world_size` ranks to the axes."""
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor_parallel_size,
        context=parallel.context_parallel_size,
        pipeline=parallel.pipeline_parallel_size,
        virtual_pipeline=parallel.virtual_pipeline_size,
    )
