"""Memory of a GPU: against peaks measured on H200s, and what must hold for any layout."""

import pytest

from nemotron_train.plan.memory import GIB, RankMemory, needed_gib, plan_memory, rank_parameters
from nemotron_train.plan.run_plan import RunPlan, plan_run
from tests.plan.small import experiment_with

NANO = "nemotron_nano_12b_v2"
SLICE = (
    "model.layer_pattern=M-M-M-M*-M-M-M-M*-", "parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false",
    "train.global_batch_size=1",
)  # fmt: skip
ALL_IN_FP8 = ("precision.bf16_first_layers=0", "precision.bf16_last_layers=0")
ALL_IN_BF16 = ("precision.format=bf16", *ALL_IN_FP8)
TP2_LOW_STATE = (
    "parallel.tensor_parallel_size=2", "train.global_batch_size=2", "optim.gradients=bf16", "optim.moments=bf16",
)  # fmt: skip
FORMATS = {  # as the groups of recipes/precision
    "bf16": ALL_IN_BF16,
    "fp8_block": (),
    "fp8_current": ("precision.format=fp8_current",),
}


def planned(*changes: str, experiment: str = NANO, world_size: int = 1) -> RunPlan:
    return plan_run(experiment_with(experiment, *changes), world_size)


def memory(*changes: str, world_size: int = 1) -> list[RankMemory]:
    return plan_memory(planned(*changes, world_size=world_size))


@pytest.mark.parametrize(("precision", "measured_gib"), [("bf16", 44.22), ("fp8_block", 47.60)])
def test_the_slice_needs_what_was_measured_on_one_gpu(precision: str, measured_gib: float) -> None:
    """Fails if a tensor that a layer keeps, a copy of the weights, or the logits are forgotten or counted twice.
    Measured by benchmarks/train_step.py (2026-11-27) before the first update, without master weights."""
    (rank,) = memory(*SLICE, f"precision.format={precision}", *ALL_IN_FP8)
    peak = rank.forward_backward_peak - rank.moments - rank.master_weights
    assert peak / GIB == pytest.approx(measured_gib, rel=0.01)


@pytest.mark.parametrize(("precision", "measured_gib"), [("bf16", 105), ("fp8_block", 115), ("fp8_current", 115)])
def test_the_12b_needs_what_was_measured_on_two_gpus(
    precision: str, measured_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the shards of the optimizer, or what its step holds with bf16 moments, are wrong. Measured with
    Megatron-Core's own model (2026-11-22), whose AdamW updates all weights at once."""
    monkeypatch.setattr("nemotron_train.plan.memory.ADAMW_ELEMENTS_AT_ONCE", 2**40)
    (rank,) = memory(*TP2_LOW_STATE, *FORMATS[precision], world_size=2)
    assert rank.peak / GIB == pytest.approx(measured_gib, rel=0.015)
    assert rank.peak > rank.forward_backward_peak


def test_an_update_in_parts_is_not_the_fullest_moment() -> None:
    """Fails if the float32 moments of one part, or of the output layer's weight, which is larger, are miscounted."""
    (rank,) = memory(*TP2_LOW_STATE, world_size=2)
    assert rank.optimizer_working == 8 * 131072 // 2 * 5120
    (shard,) = memory(*TP2_LOW_STATE, "train.global_batch_size=64", world_size=128)
    assert shard.optimizer_working == 8 * (shard.moments // 4)
    assert rank.peak == rank.forward_backward_peak


@pytest.mark.parametrize("changes", [[], ["parallel.pipeline_parallel_size=2"], ["parallel.tensor_parallel_size=4"]])
@pytest.mark.parametrize("experiment", ["nemotron_nano_9b_v2", "nemotron_t_8b"])
def test_ranks_hold_all_parameters_once(changes: list[str], experiment: str) -> None:
    """Fails if a parameter is on no rank, or on two that should share it. Norms before layers and the last one are
    whole on every tensor-parallel rank."""
    plan = planned(*changes, experiment=experiment, world_size=4)
    tp_size = plan.layout.tensor
    held = tp_size * sum(rank_parameters(plan, rank) for rank in range(plan.layout.pipeline))
    repeated = (tp_size - 1) * (len(plan.layers) + 1) * plan.config.model.hidden_size
    assert held - repeated == plan.sizes.parameters


GPT = "stability_830m"


def kept_more(*changes: str, without: tuple[str, ...] = ()) -> int:
    """How many more bytes of activations one GPU keeps with these changes."""
    (changed,), (before,) = (plan_memory(planned(*keys, experiment=GPT)) for keys in ((*without, *changes), without))
    return changed.activations - before.activations


def test_activations_of_the_parts_of_a_gpt_are_counted() -> None:
    """Fails if what a part keeps is left out. By hand, in bytes a token of the 24 attention layers (16 heads of 64
    channels, bf16); norms keep two float32 numbers for each thing they norm."""
    tokens, hidden, heads = 4096, 1024, 16
    q_and_k = 24 * tokens * (2 * hidden * 2 + 2 * heads * 8)
    assert kept_more("model.qkv_norm=qk") == q_and_k
    v_for_the_norm_before = 24 * tokens * (hidden * 2 + heads * 8 - hidden * 2 - 8)
    assert kept_more("model.qkv_norm=qkv") == q_and_k + v_for_the_norm_before
    assert kept_more("model.output_norm=true") == 48 * tokens * (hidden * 2 + 8)
    assert kept_more("model.layer_scale=0.1") == 48 * tokens * hidden * 2
    rotated_keys = 24 * tokens * hidden * 2
    rope = ("model.position_embedding=rope", "model.max_position_embeddings=null")
    assert kept_more(*rope) == rotated_keys
    assert kept_more(*rope, without=("model.qkv_norm=qk",)) == 0
    scores = 24 * heads * tokens * tokens * (4 + 4 + 2)
    assert kept_more("model.attention_logit_cap=50") == scores - 24 * heads * tokens * 4  # no log-sum-exp
    assert kept_more("model.norm=rms") == -(48 * tokens * 4)  # no mean


def test_full_recomputation_keeps_the_inputs_of_the_layers_alone() -> None:
    """Fails if a layer keeps more than its input, or what is computed again is not counted while it is there."""
    (rank,) = memory("train.recompute=full", world_size=4)
    residual = 8192 // 4 * 5120 * 2
    assert rank.activations == (62 + 2) * residual  # two more around the final norm
    (selective,), (none,) = memory("train.recompute=selective", world_size=4), memory(world_size=4)
    assert rank.activations < selective.activations < none.activations
    first_of_two = [
        memory(f"train.recompute={recompute}", "parallel.pipeline_parallel_size=2", world_size=8)[0]
        for recompute in ("full", "none")
    ]
    assert first_of_two[0].working > first_of_two[1].working


STAGES = ("parallel.pipeline_parallel_size=4", "model.layer_pattern=M-M-|M-M*-|M-M-|M-M*-")  # of 4 ranks each


def test_a_rank_is_counted_at_the_fullest_of_the_steps_that_are_taken() -> None:
    """Fails if a batch that grows is counted at its few early micro-batches, or at those of steps that no run takes; or
    if all ranks are counted in one part of the run, where the first is fullest of many micro-batches and the last of
    long samples."""
    few, many = (memory(*STAGES, f"train.global_batch_size={batch}", world_size=16) for batch in (1, 64))
    grows = "train.batch_schedule=[{start_tokens: %d, global_batch_size: 64}]"
    start = "train.global_batch_size=1"
    assert memory(*STAGES, start, grows % 10**12, world_size=16) == many
    assert memory(*STAGES, start, grows % 10**14, world_size=16) == few  # after the run's end
    long = memory(*STAGES, start, "train.seq_length=16384", world_size=16)
    both = memory(
        *STAGES, "train.global_batch_size=64",
        "train.batch_schedule=[{start_tokens: 524_288_000, global_batch_size: 1}]",
        "data.phases.1.start_tokens=524_288_000", "data.phases.1.seq_length=16384", "data.phases.2.seq_length=16384",
        world_size=16,
    )  # fmt: skip
    assert both == [max(pair, key=lambda rank: rank.peak) for pair in zip(many, long, strict=True)]
    assert (both[0], both[-1]) == (many[0], long[-1])


def test_optimizer_state_is_split_over_data_and_context_parallel_ranks() -> None:
    """Fails if replicas, or ranks that share a sample, each hold the whole state."""
    (one,), (many,) = memory(world_size=4), memory("train.global_batch_size=64", world_size=64)
    assert many.moments == pytest.approx(one.moments / 16)
    assert many.weights == one.weights
    (shared,) = memory("parallel.context_parallel_size=16", world_size=64)
    assert shared.moments == many.moments
    assert shared.activations == pytest.approx(many.activations / 16, rel=0.001)


def test_fp8_saves_activations_and_costs_copies_of_the_weights() -> None:
    """Fails if layers that stay in bf16 are counted as FP8, or the other way round."""
    (bf16,), (some,), (every,) = (memory(*SLICE, *precision) for precision in (ALL_IN_BF16, (), ALL_IN_FP8))
    assert bf16.activations > some.activations > every.activations
    mamba, attention, mlp = 5120 * (22656 + 10240), 5120 * (7168 + 5120), 2 * 5120 * 20480
    # Mamba and MLP at the start, attention and MLP at the end; two copies of each weight.
    assert every.fp8_weights - some.fp8_weights == 2 * (mamba + mlp + attention + mlp)


def test_fp8_primary_weights_replace_the_bf16_ones() -> None:
    """Fails if the copy by columns is forgotten, layers that stay in bf16 lose theirs, or AdamW is still taken to keep
    only what bf16 weights lack."""
    primary = "precision.primary_weights=fp8"
    (before,), (after,) = memory(*TP2_LOW_STATE, world_size=2), memory(*TP2_LOW_STATE, primary, world_size=2)
    quantised = before.fp8_weights // 2
    assert quantised > 0
    assert before.weights - after.weights == quantised  # one byte less of each
    assert after.fp8_weights == quantised
    parameters = before.weights // 2
    assert after.master_weights == 2 * before.master_weights == 4 * parameters
    assert after.optimizer_working - before.optimizer_working == 4 * parameters  # gradients in float32
    (plain,), (lean,) = memory(world_size=4), memory(primary, world_size=4)
    assert lean.master_weights == plain.master_weights
    assert plain.held - lean.held == plain.fp8_weights  # of four bytes two stay: by rows and by columns


OVERLAP = ("parallel.overlap_tensor_comm=true", "train.global_batch_size=4")


@pytest.mark.parametrize(
    ("changes", "tokens", "bytes_of_a_number"),
    [
        (ALL_IN_BF16, 8192, 12 * 2),
        (("precision.format=fp8_current", *ALL_IN_FP8), 8192, 8 * 1 + 4 * 2),
        (("precision.format=fp8_current",), 8192, 12 * 2 + 8 * 1 + 4 * 2),  # its first and last layers are in bf16
        ((*ALL_IN_BF16, "parallel.context_parallel_size=2"), 4096, 12 * 2),
    ],
)
def test_user_buffers_are_outside_the_peak_and_needed(
    changes: tuple[str, ...], tokens: int, bytes_of_a_number: int
) -> None:
    """Fails if a GPU is said to do that has no room for what tensor-parallel ranks exchange through."""
    plan, without = (planned(*OVERLAP, f"parallel.overlap_tensor_comm={overlap}", *changes, world_size=8)
                     for overlap in ("true", "false"))  # fmt: skip
    buffers = tokens * 5120 * bytes_of_a_number
    ranks, others = plan_memory(plan), plan_memory(without)
    assert [rank.user_buffers for rank in ranks] == [buffers]
    assert ranks[0].peak == others[0].peak
    assert needed_gib(ranks) - needed_gib(others) == pytest.approx(buffers / GIB)
    assert others[0].user_buffers == 0


def test_a_graph_keeps_its_memory_from_the_others() -> None:
    """Fails if a GPU is said to do that has room for the passes, but not beside them for AdamW or an evaluation."""
    graphs = "train.cuda_graphs=true"
    for changes, part in (
        (ALL_IN_BF16, "working"),
        (("optim.moments=bf16", "train.seq_length=1024"), "optimizer_working"),
    ):
        (plain,), (graphed,) = (plan_memory(planned(*SLICE, *changes, *own)) for own in ((), (graphs,)))
        assert max(plain.working, plain.optimizer_working) == getattr(plain, part)
        assert plain.beside_graphs == 0
        assert graphed.beside_graphs == getattr(plain, part)
        assert graphed.peak == plain.peak
        assert needed_gib([graphed]) - needed_gib([plain]) == pytest.approx(getattr(plain, part) / GIB)
    stages = plan_memory(
        planned(graphs, "parallel.pipeline_parallel_size=4", "train.global_batch_size=8", world_size=16)
    )
    fullest = max(stages, key=lambda rank: rank.peak + rank.beside_graphs)
    assert len({rank.beside_graphs for rank in stages}) > 1
    assert needed_gib(stages) == needed_gib([fullest])
