"""Which main gradients does a step clear, and which does its first micro-batch overwrite?

What overwrites them are Transformer Engine's products, on a GPU (test_transformer_engine.py); here a plain layer is
told to be one.
"""

from pathlib import Path

import torch

from nemotron_train.config.schema import RunConfig
from nemotron_train.engine.wrap import overwrite_gradients, zero_gradients
from nemotron_train.step import run_all
from tests.engine.live import live_run, micro_batches, random_samples
from tests.ranks import RankPool
from tests.small_runs import small_config


def gradients_of_a_step(config: RunConfig) -> dict[str, tuple[bool, bool]]:
    """Of each parameter: whether its main gradient is cleared before a step, and whether a product would overwrite it,
    before and after the first micro-batch."""
    with live_run(config) as run:
        (chunk,) = run.chunks
        chunk.module.output_layer.fuse_wgrad_accumulation = True
        overwrite_gradients(run.chunks)
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(5.0)
        zero_gradients(run.chunks)
        found = {}
        for name, parameter in chunk.module.named_parameters():
            found[name] = (not parameter.main_grad.any(), getattr(parameter, "overwrite_main_grad", False))
            assert found[name][0] or torch.all(parameter.main_grad == 5.0), name
        run_all(run, micro_batches(random_samples(0, 2, config), 2), forward_only=False)
        assert not any(getattr(parameter, "overwrite_main_grad", False) for parameter in chunk.module.parameters())
        return found


def test_only_what_products_fill_is_left_as_it_is(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a gradient that nothing overwrites keeps an earlier step's, or the second micro-batch overwrites too."""
    (found,) = ranks.run(gradients_of_a_step, 1, small_config(corpus, tmp_path))
    assert found.pop("output_layer.weight") == (False, True)
    assert found
    assert set(found.values()) == {(True, False)}
