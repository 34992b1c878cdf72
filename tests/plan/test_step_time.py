"""Times of a step: against the 12B measured on two H200s, and a pipeline run event by event."""

from dataclasses import replace

import pytest

from nemotron_train.config.schema import PrecisionFormat, Recompute
from nemotron_train.plan.layer_times import layer_seconds, recompute_seconds, stage_costs
from nemotron_train.plan.measured import H100, H200, OPTIMIZER_BYTES_PER_PARAMETER
from nemotron_train.plan.memory import rank_fp8_weights
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.pipeline_cut import chunk_costs
from nemotron_train.plan.step_time import plan_time, step_time
from nemotron_train.plan.traffic import pipeline_seconds
from tests.plan import simulated_pipeline
from tests.plan.test_memory import ALL_IN_BF16, ALL_IN_FP8, FORMATS, SLICE, TP2_LOW_STATE, planned

MEASURED_FORMATS = (PrecisionFormat.bf16, PrecisionFormat.fp8_block, PrecisionFormat.fp8_current)


@pytest.mark.parametrize("kind", LayerKind)
@pytest.mark.parametrize("format", MEASURED_FORMATS)
def test_a_layer_of_the_measured_shape_takes_the_measured_time(kind: LayerKind, format: PrecisionFormat) -> None:
    """Fails if parting a layer's time into kinds of work loses some of it."""
    config = planned(*SLICE).config
    assert layer_seconds(kind, format, config, 8192, H200).total == pytest.approx(H200.layer_ms[kind][format] * 1e-3)


def test_four_times_the_tokens_take_four_times_as_long_and_attention_longer() -> None:
    """Fails if a part does not grow with the tokens, or attention does not grow with the square of a sample."""
    config = planned(*SLICE).config
    for kind in LayerKind:
        short, long = (layer_seconds(kind, PrecisionFormat.bf16, config, length, H200) for length in (8192, 32768))
        assert long.products == pytest.approx(4 * short.products)
        assert long.core == pytest.approx((16 if kind is LayerKind.attention else 4) * short.core)
        assert long.elementwise == pytest.approx(4 * short.elementwise)


@pytest.mark.parametrize(("tp_size", "added_ms"), [(1, 0), (2, 1.5)])
def test_what_splitting_costs_is_added_to_layers_that_are_split(tp_size: int, added_ms: float) -> None:
    """Fails if a table's `tensor_parallel_ms` is left out or counted for whole layers."""
    config = planned(*SLICE, f"parallel.tensor_parallel_size={tp_size}", world_size=tp_size).config
    free_of_charge = replace(H200, tensor_parallel_ms={PrecisionFormat.bf16: 0.0})
    costly = replace(H200, tensor_parallel_ms={PrecisionFormat.bf16: 1.5})
    for kind in LayerKind:
        free, split = (
            layer_seconds(kind, PrecisionFormat.bf16, config, 8192, gpu).total for gpu in (free_of_charge, costly)
        )
        assert split - free == pytest.approx(1e-3 * added_ms)


@pytest.mark.parametrize(
    ("launch_ms", "total_ms"), [((0, 0), 12), ((4, 8), 12), ((10, 0), 18), ((0, 11), 15), ((10, 20), 30)]
)
def test_a_layer_takes_as_long_as_starting_its_kernels(launch_ms: tuple[float, float], total_ms: float) -> None:
    """Fails if a layer of few tokens or small shares is planned faster than the CPU starts it, or the CPU's work is
    added to that of the GPU, which runs beside it."""
    mlp, bf16 = LayerKind.mlp, PrecisionFormat.bf16
    gpu = replace(H200, layer_ms={mlp: {bf16: 12.0}}, launch_ms={mlp: {bf16: launch_ms}})
    seconds = layer_seconds(mlp, bf16, planned(*SLICE).config, 8192, gpu)
    assert seconds.total == pytest.approx(1e-3 * total_ms)
    again = recompute_seconds(mlp, seconds, Recompute.full)
    assert again == pytest.approx(1e-3 * max(launch_ms[0], 4)), "the forward pass"


def test_a_graph_waits_for_no_cpu() -> None:
    """Fails if what starting kernels takes is counted where they start themselves."""
    slow = replace(H200, launch_ms={kind: {PrecisionFormat.bf16: (1e3, 1e3)} for kind in LayerKind})
    config = planned(*SLICE, "train.cuda_graphs=true").config
    for kind in LayerKind:
        total = layer_seconds(kind, PrecisionFormat.bf16, config, 8192, slow).total
        assert total == pytest.approx(1e-3 * H200.layer_ms[kind][PrecisionFormat.bf16])


def test_gradients_are_cleared_where_layers_are_recomputed() -> None:
    """Fails if clearing is left out, counted where products overwrite the gradients, or of another size than theirs."""
    for gradients, size in (("fp32", 4), ("bf16", 2)):
        none, full = (planned(*SLICE, *ALL_IN_BF16, f"optim.gradients={gradients}", f"train.recompute={how}")
                      for how in ("none", "full"))  # fmt: skip
        update, update_and_clear = (step_time(plan, plan.batches.segments[0], H200).optimizer for plan in (none, full))
        of_an_update = size / OPTIMIZER_BYTES_PER_PARAMETER
        assert update_and_clear == pytest.approx(update * (1 + of_an_update))


def test_new_weights_are_quantised_once_a_step() -> None:
    """Fails if what a step's first micro-batch costs is counted for each, in bf16, or for weights of other ranks."""
    slow = replace(H200, first_pass_ps_per_weight=dict.fromkeys(MEASURED_FORMATS, 1000.0))
    quick = replace(slow, first_pass_ps_per_weight=dict.fromkeys(MEASURED_FORMATS, 0.0))

    def added_ms(*changes: str, world_size: int = 1) -> float:
        plan = planned(*SLICE, *ALL_IN_FP8, *changes, world_size=world_size)
        first = plan.batches.segments[0]
        return 1e3 * (step_time(plan, first, slow).total - step_time(plan, first, quick).total)

    once = added_ms("precision.format=fp8_block")
    assert once == pytest.approx(1e-6 * rank_fp8_weights(planned(*SLICE, *ALL_IN_FP8, "precision.format=fp8_block"), 0))
    assert added_ms("precision.format=fp8_block", "train.global_batch_size=4") == pytest.approx(once)
    assert added_ms("precision.format=bf16") == 0
    halved = added_ms("precision.format=fp8_block", "parallel.tensor_parallel_size=2", world_size=2)
    assert halved == pytest.approx(once / 2)


@pytest.mark.parametrize(("precision", "measured"), [("bf16", [7494]), ("fp8_block", [8826, 9109, 9188])])
def test_the_12b_on_two_gpus_runs_as_measured(precision: str, measured: list[float]) -> None:
    """Fails if tensor parallelism costs less or more than it did: tokens/s per GPU by benchmarks/train_step.py
    (2026-11-27, two machines). Nothing of it is in the table."""
    changes = (*TP2_LOW_STATE, *FORMATS[precision], "train.global_batch_size=8")
    timed = plan_time(planned(*changes, world_size=2))
    for tokens_per_second in measured:
        assert timed.tokens_per_second_per_gpu == pytest.approx(tokens_per_second, rel=0.06)


@pytest.mark.parametrize(("pp_size", "vpp_size"), [(2, 1), (4, 1), (4, 2)])
def test_waiting_for_other_ranks_is_part_of_a_step(pp_size: int, vpp_size: int) -> None:
    """Fails if work and waiting of the rank that has most to do are not the time of the whole schedule."""
    sizes = [f"parallel.pipeline_parallel_size={pp_size}", f"parallel.virtual_pipeline_size={vpp_size}"]
    plan = planned(*sizes, "parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false",
                   "train.global_batch_size=16", world_size=pp_size)  # fmt: skip
    chunks = chunk_costs(plan.chunks, stage_costs(plan.config, plan.pattern, 8192))
    time = step_time(plan, plan.batches.segments[0], H200)
    assert time.layers + time.bubble == pytest.approx(simulated_pipeline.seconds(chunks, pp_size, 16))
    assert time.layers == pytest.approx(16 * max(sum(chunks[rank::pp_size]) for rank in range(pp_size)))


@pytest.mark.parametrize(("vpp_size", "sends"), [(1, 16 + 3), (2, 7)])
def test_sending_to_the_next_stage_is_waited_for_unless_interleaved(vpp_size: int, sends: int) -> None:
    """Fails if hidden states travel free, or an interleaved schedule waits for each of them."""
    sizes = ["parallel.pipeline_parallel_size=4", f"parallel.virtual_pipeline_size={vpp_size}"]
    plan = planned(*sizes, "parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false",
                   "train.global_batch_size=16", world_size=4)  # fmt: skip
    once = pipeline_seconds(plan.config, plan.layout, 8192, H200)
    assert once > 0
    assert step_time(plan, plan.batches.segments[0], H200).pipeline_traffic == pytest.approx(sends * once)


def test_one_gpu_waits_for_nobody() -> None:
    """Fails if what is left of rounding is shown as a bubble."""
    for batch in (1, 12, 64):
        plan = planned(*SLICE, f"train.global_batch_size={batch}")
        assert step_time(plan, plan.batches.segments[0], H200).bubble == 0.0


def test_a_run_is_the_sum_of_its_steps() -> None:
    """Fails if a segment of the batch schedule, or a phase of longer samples, is timed as another one."""
    longer = [
        "train.batch_schedule=[{start_tokens: 1_006_632_960, global_batch_size: 48}]",
        "data.phases=[{start_tokens: 0, weights: [{source: code, weight: 1.0}]}, {start_tokens: 1_006_632_960, "
        "seq_length: 131072, weights: [{source: code, weight: 1.0}]}]",
        "data.sources=[{name: code, prefixes: [code]}]", "train.train_tokens=3_019_898_880",
        "lr.schedule=constant", "lr.min=null", "lr.decay_tokens=null", "lr.decay_shape=null", "lr.warmup_tokens=0",
        "train.global_batch_size=768",
    ]  # fmt: skip
    plan = planned(*longer, world_size=16)
    first, second = plan.batches.segments
    by_hand = 160 * step_time(plan, first, H200).total + 320 * step_time(plan, second, H200).total
    assert plan_time(plan).days * 86_400 == pytest.approx(by_hand)
    assert step_time(plan, second, H200).total > 1.05 * step_time(plan, first, H200).total


def test_what_is_bound_by_memory_is_slower_on_an_h100() -> None:
    """Fails if the card makes no difference, or matrix products are slowed with it."""
    config = planned(*SLICE).config
    ours, theirs = (layer_seconds(LayerKind.mamba, PrecisionFormat.bf16, config, 8192, gpu) for gpu in (H200, H100))
    assert theirs.core == pytest.approx(ours.core * 4.8 / 3.35)
    assert theirs.products == ours.products


def _seconds(changes: list[str], world_size: int) -> float:
    plan = planned(*changes, world_size=world_size)
    return step_time(plan, plan.batches.segments[0], H200).total


@pytest.mark.parametrize(
    ("slow", "fast", "world_size"),
    [
        (["train.recompute=full"], ["train.recompute=none"], 8),
        (["parallel.overlap_grad_reduce=false"], [], 736),
        ([], ["parallel.overlap_param_gather=true"], 736),
        ([], ["precision.primary_weights=fp8"], 736),
        (["parallel.tensor_parallel_size=8"], ["parallel.tensor_parallel_size=2"], 8),
        (["parallel.pipeline_parallel_size=2"], [], 8),
        (["parallel.context_parallel_size=2"], [], 8),
    ],
)
def test_what_costs_time_costs_time(slow: list[str], fast: list[str], world_size: int) -> None:
    """Fails if recomputation, exposed traffic or finer splitting is free."""
    assert _seconds(slow, world_size) > 1.004 * _seconds(fast, world_size)
