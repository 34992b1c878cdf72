"""Does a batch number documents, and leave out of the loss what would tie two of them together?"""

import numpy as np
import torch

from nemotron_train.data.batch import build_batch

EOD = 4


def test_documents_are_numbered_and_ends_carry_no_loss() -> None:
    """Fails if the token that ends a document is counted to the next, or predicts the next document's first token."""
    windows = [
        np.array([7, EOD, 8, 9, EOD, EOD, 5]),  # a document of one token
        np.array([EOD, 7, 8, 9, 7, EOD, EOD]),  # ends at the first and the last place; the last label stands alone
        np.array([7, 8, 9, 7, 8, 9, EOD]),  # an end is still predicted
    ]
    batch = build_batch(windows, [0, 0, 1], 3, 6, eod_id=EOD)
    assert batch.document_BS is not None
    assert batch.document_BS.dtype is torch.int32
    assert batch.document_BS.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1], [0] * 6]
    assert batch.loss_mask_BS.tolist() == [[1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [1] * 6]


def test_rows_without_a_window_are_one_document() -> None:
    """Fails if the zeros that fill a row are taken for ends of documents where 0 is the token that ends them."""
    batch = build_batch([np.array([7, 0, 8, 9])], [0], 2, 3, eod_id=0)
    assert batch.document_BS is not None
    assert batch.document_BS.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch.loss_mask_BS.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_documents_are_not_told_apart_unless_asked_to() -> None:
    """Fails if an end is masked, or documents numbered, without the token that ends them."""
    batch = build_batch([np.array([7, EOD, 8, 9])], [0], 1, 3)
    assert batch.document_BS is None
    assert batch.loss_mask_BS.tolist() == [[1, 1, 1]]
    assert batch.to("cpu").document_BS is None


def test_documents_move_with_their_batch() -> None:
    """Fails if the numbers of documents are left behind when a batch moves to a device."""
    moved = build_batch([np.array([7, EOD, 8, 9])], [0], 1, 3, eod_id=EOD).to("meta")
    assert moved.document_BS is not None
    assert moved.document_BS.device.type == "meta"
