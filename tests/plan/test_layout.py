"""Ranks stand where Megatron-Core puts them."""

import pytest
from megatron.core.parallel_state import RankGenerator

from nemotron_train.plan.layout import Layout, RankCoordinates


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 1, 4), (1, 2, 3, 2), (4, 1, 2, 2), (2, 2, 2, 3)])
def test_coordinates_are_those_of_megatron_core(sizes: tuple[int, int, int, int]) -> None:
    """Fails if the order of the axes differs from Megatron-Core's groups."""
    tensor, context, data, pipeline = sizes
    layout = Layout(tensor * context * data * pipeline, tensor, context, pipeline)
    assert layout.data == data
    mcore = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    for axis in ("tp", "cp", "dp", "pp"):
        for group in mcore.get_ranks(axis):
            assert [getattr(layout.coordinates(rank), axis) for rank in group] == list(range(len(group)))
            elsewhere = {tuple((vars(layout.coordinates(rank)) | {axis: 0}).values()) for rank in group}
            assert len(elsewhere) == 1


def test_tensor_is_fastest_and_pipeline_slowest() -> None:
    """Fails if tensor-parallel ranks stop being neighbours."""
    layout = Layout(world_size=8, tensor=2, pipeline=2)
    assert layout.coordinates(1) == RankCoordinates(tp=1, cp=0, dp=0, pp=0)
    assert layout.coordinates(2) == RankCoordinates(tp=0, cp=0, dp=1, pp=0)
    assert layout.coordinates(4) == RankCoordinates(tp=0, cp=0, dp=0, pp=1)
