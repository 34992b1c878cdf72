"""One micro-batch through a model chunk, and the contract with Megatron-Core's pipeline schedules.

A schedule calls `forward_step(batches, chunk)` once per micro-batch and chunk. It must return the chunk's output and a
function that the schedule calls with that output on the last pipeline stage only. That function returns `(loss_sum,
num_tokens, report)`:

* the schedule differentiates `loss_sum`, a plain sum over this micro-batch's real tokens;
* because `calculate_per_token_loss` is set, it does not divide by anything itself, but adds up `num_tokens` over
micro-batches, and
  `finalize_model_grads` divides the gradients, summed over all data-parallel ranks, by the token count of the global
  batch. That is why neither the micro-batch size nor the layout changes a gradient. (Without the flag Megatron-Core
  divides by this micro-batch's tokens and by the number of micro-batches, which is another loss as soon as
  micro-batches differ in real tokens.)
* the `report`s come back from the schedule as a list.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from nemotron_train.data.batch import Batch
from nemotron_train.loss import LossReport, sum_losses

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, LossReport]]


def forward_step(batches: Iterator[Batch], chunk: nn.Module, *, num_sources: int) -> tuple[Tensor, LossFunction]:
    """Run the next micro-batch through `chunk`. Bind `num_sources` before handing this to a schedule."""
    batch = next(batches)
    output = chunk(batch.tokens_BS, batch.labels_BS, batch.document_BS)
    return output, partial(sum_losses, batch=batch, num_sources=num_sources)
