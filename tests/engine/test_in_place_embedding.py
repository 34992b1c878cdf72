"""Does the embedding that adds to the main gradient in place give the gradient of Megatron-Core's own?

On the CPU its kernel runs in Triton's interpreter (tests/conftest.py).
"""

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")

from nemotron_train.engine.in_place_embedding import InPlaceEmbedding
from nemotron_train.engine.megatron_on_cpu import run_megatron_on_cpu
from nemotron_train.ops.triton_row_sums import add_rows
from tests.ranks import RankPool

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel would want tensors of the GPU")


def output_and_gradients(sequence_parallel: bool) -> list[tuple[Tensor, Tensor]]:
    """Of Megatron-Core's embedding and of ours: the output, and the main gradient after two micro-batches."""
    run_megatron_on_cpu()
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 0)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=20,
        num_attention_heads=2,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        perform_initialization=False,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
    )
    random = torch.Generator().manual_seed(0)
    table = torch.randn(12, 20, generator=random).chunk(size)[dist.get_rank()]
    tokens = torch.randint(0, 12, (2, 2, 16), generator=random)
    results = []
    for kind in (LanguageModelEmbedding, InPlaceEmbedding):
        embedding = kind(config, 12, 0, position_embedding_type="none", tp_group=dist.group.WORLD)
        weight = embedding.word_embeddings.weight
        weight.data.copy_(table)
        weight.main_grad = torch.ones_like(weight)
        for micro_batch in tokens:
            weight.grad, weight.grad_added_to_main_grad = None, False
            x = embedding(micro_batch, None)
            x.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
            if not weight.grad_added_to_main_grad:
                weight.main_grad += weight.grad
        results.append((x.detach(), weight.main_grad))
    dist.destroy_process_group()
    return results


@on_cpu
@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_it_is_the_embedding_of_megatron_core(world_size: int, sequence_parallel: bool, ranks: RankPool) -> None:
    """Fails if a repeated token counts once, another rank's token is looked up here, or a micro-batch is not added."""
    for expected, found in ranks.run(output_and_gradients, world_size, sequence_parallel):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)


def rows_and_indices(tokens: int, width: int, table_rows: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=random), torch.randint(-2, table_rows, (tokens,), generator=random)


@on_cpu
def test_a_row_is_summed_in_float32_and_rounded_once() -> None:
    """Fails if a table in bfloat16 is rounded with each token, or tokens of other ranks are added."""
    # The interpreter rounds to bfloat16 by cutting off.
    rows, index = rows_and_indices(200, 24, 3)
    whole = torch.ones(5, 24).bfloat16()
    before, table = whole[:2], whole[2:]
    exact = table.double().index_add(0, index[index >= 0], rows[index >= 0].double())
    add_rows(table, index, rows)
    torch.testing.assert_close(table.double(), exact, rtol=2**-7, atol=0)
    assert (before == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_on_a_gpu() -> None:
    """Fails if the compiled kernel adds up something else, or in another order each time."""
    rows, index = (t.cuda() for t in rows_and_indices(5000, 5120, 40))
    rows = rows.bfloat16()
    tables = [torch.ones(40, 5120, device="cuda") for _ in range(2)]
    for table in tables:
        add_rows(table, index, rows)
    exact = torch.ones_like(tables[0]).double().index_add(0, index[index >= 0], rows[index >= 0].double())
    torch.testing.assert_close(tables[0].double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(*tables)
