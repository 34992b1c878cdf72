"""One micro-batch through a model chunk, and the contract with Megatron-Core's pipeline schedules.

A schedule calls `forward_step(batches, chunk)` once per micro-batch and chunk. It must return the chunk's output and a
function that the schedule calls with that output on the last pipeline stage only. That function returns `(loss_sum,
num_tokens, report)`:

* the schedule differentiates `loss_sum`: nats of this micro-batch's real tokens, divided by the real tokens of the
  global batch. Summed over micro-batches and data-parallel ranks, that is the gradient of the mean, whatever the
  micro-batch size and the layout. The count is known before the first forward pass, because the data plan is, so no
  pass over the gradients is needed afterwards;
* `calculate_per_token_loss` is set, so that the schedule and the gradient buckets divide by nothing themselves, and
  `num_tokens` is not used (engine/mcore_config.py);
* the `report`s come back from the schedule as a list.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from nemotron_train.data.batch import Batch
from nemotron_train.loss import LossReport, sum_losses

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, LossReport]]


def forward_step(
    batches: Iterator[Batch], chunk: nn.Module, *, num_sources: int, tokens_in_step: Tensor
) -> tuple[Tensor, LossFunction]:
    """Run the next micro-batch through `chunk`. Bind the named arguments before handing this to a schedule.

    Args:
        tokens_in_step: real tokens of the global batch, a scalar.
    """
    batch = next(batches)
    output = chunk(batch.tokens_BS, batch.labels_BS, batch.document_BS)
    return output, partial(sum_losses, batch=batch, num_sources=num_sources, tokens_in_step=tokens_in_step)
