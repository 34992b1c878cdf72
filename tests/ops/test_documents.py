"""Are the documents of a micro-batch found where their numbers change?"""

import torch

from nemotron_train.ops.documents import Documents


def test_documents_know_their_bounds() -> None:
    """Fails if a sample's first document continues the one before it, or bounds are off by one."""
    found = Documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3], [0, 0, 0, 0, 0]], dtype=torch.int32))
    assert found.cu_seqlens.tolist() == [0, 2, 5, 6, 7, 9, 10, 15]
    assert found.cu_seqlens.dtype is torch.int32
    assert found.lengths == [[2, 3], [1, 1, 2, 1], [5]]


def test_places_begin_anew_in_every_document() -> None:
    """Fails if a place is counted from the sample's start, or from another sample's document."""
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]], dtype=torch.int32))
    assert documents.positions_BS.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]


def test_each_document_is_run_on_its_own_and_put_back_in_place() -> None:
    """Fails if tokens of two documents or samples meet, or results come back in another order."""
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]], dtype=torch.int32))
    first, second = torch.arange(10.0).view(5, 2), 100 * torch.arange(10.0).view(5, 2)
    found = documents.run_each(lambda a_SB, b_SB: (a_SB + b_SB).cumsum(0), first, second)
    assert (found / 101).t().tolist() == [[0, 2, 4, 10, 18], [1, 3, 5, 12, 9]]


def test_a_gradient_of_many_documents_takes_the_memory_of_one_tensor() -> None:
    """Fails if the gradient of every document is as large as the whole: slow and large for samples of many of them."""
    documents = Documents(torch.arange(64, dtype=torch.int32)[None])
    x_SB = torch.randn(64, 1, requires_grad=True)
    node = documents.run_each(lambda part_SB: part_SB, x_SB).grad_fn
    kinds = set()
    nodes = [node]
    while nodes:
        node = nodes.pop()
        kinds.add(type(node).__name__)
        nodes += [child for child, _ in node.next_functions if child is not None]
    assert kinds == {"CatBackward0", "SplitWithSizesBackward0", "SplitBackward0", "AccumulateGrad"}
