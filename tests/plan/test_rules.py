"""Every rule is broken once; its message has the values that clash and the keys to change."""

import pytest

from nemotron_train.config.keys import describe_keys
from nemotron_train.errors import ConfigError
from nemotron_train.plan.architecture_rules import ARCHITECTURE_RULES
from nemotron_train.plan.precision_rules import PRECISION_RULES
from nemotron_train.plan.ranges import RANGES
from nemotron_train.plan.rules import MODEL_RULES, RUN_RULES, check_rules
from tests.plan.small import config_with

TP2 = "parallel.tensor_parallel_size=2"
OVERLAP = "parallel.overlap_tensor_comm=true"
GRAPHS = "train.cuda_graphs=true"
PP2 = "parallel.pipeline_parallel_size=2"
CP2, CP4 = (f"parallel.context_parallel_size={size}" for size in (2, 4))
FP8 = ["precision.format=fp8_block", "model.mamba_num_heads=16"]  # sizes that FP8 takes
WORDS = "whole number", "number", "whole number or null", "number or null"

ALL_RULES = (*MODEL_RULES, *ARCHITECTURE_RULES, *PRECISION_RULES, *RUN_RULES)

# rule, changes to the quickstart (16 samples of 256 tokens, micro-batch 8, 10 layers), ranks, what the message holds
BROKEN: list[tuple[str, list[str], int, list[str]]] = [
    (
        "positions_have_their_keys",
        ["model.position_embedding=learned"],
        1,
        ["model.max_position_embeddings is null", "model.position_embedding=learned"],
    ),
    (
        "positions_have_their_keys",
        ["model.position_embedding=rope", "model.max_position_embeddings=512"],
        1,
        ["model.max_position_embeddings=512", "model.position_embedding=rope", "null"],
    ),
    (
        "positions_have_their_keys",
        ["model.rope_base=500000"],
        1,
        ["model.rope_base=500000.0", "model.position_embedding=none", "null"],
    ),
    (
        "samples_fit_into_the_learned_positions",
        ["model.position_embedding=learned", "model.max_position_embeddings=255"],
        1,
        ["train.seq_length=256", "model.max_position_embeddings=255"],
    ),
    (
        "samples_fit_into_the_learned_positions",
        ["model.position_embedding=learned", "model.max_position_embeddings=256", "data.phases.1.seq_length=512"],
        1,
        ["data.phases[1].seq_length=512", "model.max_position_embeddings=256"],
    ),
    (
        "rotated_heads_have_pairs_of_channels",
        ["model.position_embedding=rope", "model.attention_head_dim=33"],
        1,
        ["model.attention_head_dim=33", "model.position_embedding=rope", "34"],
    ),
    *(
        ("options_of_attention_need_attention", [change, "model.layer_pattern=M-M-"], 1, [change, "M-M-", neutral])
        for change, neutral in (
            ("model.position_embedding=rope", "none"),
            ("model.qkv_norm=qk", "none"),
            ("model.attention_logit_scale=0.5", "1.0"),
            ("model.attention_logit_cap=50.0", "null"),
        )
    ),
    (
        "mamba_layers_have_no_biases",
        ["model.linear_bias=true", "model.layer_pattern=M-M*"],
        1,
        ["model.linear_bias=true", "M-M*"],
    ),
    (
        "normed_values_are_split_over_the_sequence",
        [TP2, "model.qkv_norm=qkv"],
        2,
        ["model.qkv_norm=qkv", "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    (
        "fp8_keys_need_fp8",
        ["precision.bf16_first_layers=1"],
        1,
        ["precision.bf16_first_layers=1", "precision.format=fp32"],
    ),
    (
        "some_layers_run_in_fp8",
        [*FP8, "precision.bf16_first_layers=5", "precision.bf16_last_layers=6"],
        1,
        ["precision.bf16_first_layers=5", "precision.bf16_last_layers=6", "10 layers"],
    ),
    (
        "fp8_keys_need_fp8",
        ["precision.format=bf16", "precision.primary_weights=fp8"],
        1,
        ["precision.primary_weights=fp8", "precision.format=bf16", "bf16"],
    ),
    (
        "delayed_scaling_keeps_bf16_weights",
        [*FP8, "precision.format=fp8_delayed", "precision.primary_weights=fp8"],
        1,
        ["precision.primary_weights=fp8", "precision.format=fp8_delayed", "bf16", "fp8_block"],
    ),
    (
        "delayed_scaling_covers_all_layers",
        [*FP8, "precision.format=fp8_delayed", "precision.bf16_last_layers=1"],
        1,
        ["precision.bf16_last_layers=1", "fp8_delayed"],
    ),
    (
        "fp8_products_are_aligned",
        [*FP8, CP2, "train.seq_length=48", "train.micro_batch_size=1"],
        2,
        ["train.seq_length=48", "parallel.context_parallel_size=2", "24 tokens", "16 or 32"],
    ),
    (
        "fp8_products_are_aligned",
        ["precision.format=fp8_block"],
        1,
        ["mixer.in_proj", "778 outputs", "784", "model.mamba_num_heads=16"],
    ),
    (
        "fp8_products_are_aligned_where_sequences_are_split",
        [
            *FP8,
            TP2,
            "model.mamba_num_heads=32",
            "parallel.sequence_parallel=true",
            "model.hidden_size=256",
            "train.seq_length=120",
        ],
        2,
        ["train.seq_length=120", "960 tokens", "multiples of 128", "768 or 1024"],
    ),
    (
        "fp8_products_are_aligned_where_sequences_are_split",
        [*FP8, TP2, "model.mamba_num_heads=32", "parallel.sequence_parallel=true"],
        2,
        ["model.hidden_size=160", "128 or 256", "sequence_parallel=false"],
    ),
    (
        "fp8_products_are_aligned_where_sequences_are_split",
        [
            *FP8,
            "parallel.tensor_parallel_size=4",
            "model.mamba_num_heads=64",
            "model.mamba_num_groups=4",
            "model.num_query_groups=4",
            "parallel.sequence_parallel=true",
            "precision.format=fp8_current",
            "train.micro_batch_size=2",
            "train.seq_length=248",
        ],
        4,
        ["train.seq_length=248", "496 tokens", "multiples of 8"],
    ),
    (
        "bf16_state_needs_bf16_weights",
        ["optim.moments=bf16"],
        1,
        ["optim.moments=bf16", "precision.format=fp32"],
    ),
    (
        "pattern_is_readable_and_can_be_cut",
        ["model.layer_pattern=M-X"],
        1,
        ["model.layer_pattern", "'X'", "position 3"],
    ),
    (
        "pattern_is_readable_and_can_be_cut",
        ["parallel.pipeline_parallel_size=11"],
        11,
        ["10 layers", "11 pieces", "parallel.pipeline_parallel_size=11"],
    ),
    ("pattern_is_readable_and_can_be_cut", ["model.layer_pattern=M|-"], 1, ["2 pieces", "pipeline_parallel_size=1"]),
    (
        "query_groups_divide_attention_heads",
        ["model.num_query_groups=3"],
        1,
        ["model.num_attention_heads=4", "model.num_query_groups=3", "2 or 4"],
    ),
    (
        "mamba_groups_divide_mamba_heads",
        ["model.mamba_num_groups=4"],
        1,
        ["model.mamba_num_heads=10", "model.mamba_num_groups=4", "2 or 5"],
    ),
    ("ranks_hold_whole_replicas", [TP2], 5, ["5 ranks", "parallel.tensor_parallel_size=2", "4 or 6"]),
    ("ranks_hold_whole_replicas", [TP2, PP2], 3, ["3 ranks", "take 4", "pipeline_parallel_size=2", "Start 4 ranks"]),
    (
        "tensor_parallel_size_divides_the_model",
        [TP2, "model.num_attention_heads=5", "model.num_query_groups=5"],
        2,
        ["model.num_attention_heads=5", "model.num_query_groups=5", "parallel.tensor_parallel_size=2", "4 or 6"],
    ),
    (
        "tensor_parallel_size_divides_the_model",
        [TP2, "model.num_query_groups=1"],
        2,
        ["model.num_query_groups=1", "parallel.tensor_parallel_size=2"],
    ),
    (
        "tensor_parallel_size_divides_the_model",
        [TP2, "model.mamba_num_groups=5"],
        2,
        ["model.mamba_num_groups=5", "parallel.tensor_parallel_size=2", "4 or 6"],
    ),
    (
        "tensor_parallel_size_divides_the_model",
        [TP2, "model.mamba_num_heads=9", "model.mamba_num_groups=3"],
        2,
        ["model.mamba_num_heads=9", "parallel.tensor_parallel_size=2", "8 or 10"],
    ),
    (
        "tensor_parallel_size_divides_the_model",
        [TP2, "model.ffn_hidden_size=481"],
        2,
        ["model.ffn_hidden_size=481", "parallel.tensor_parallel_size=2", "480 or 482"],
    ),
    (
        # Megatron-Core's configuration asks for it without attention layers too.
        "tensor_parallel_size_divides_the_model",
        [TP2, "model.layer_pattern=M-M-", "model.num_attention_heads=3"],
        2,
        ["model.num_attention_heads=3", "parallel.tensor_parallel_size=2", "2 or 4"],
    ),
    (
        "tensor_parallel_size_divides_the_vocabulary",
        [TP2, "model.vocab_size=2047"],
        2,
        ["model.vocab_size=2047", "parallel.tensor_parallel_size=2", "2048"],
    ),
    (
        "sequence_parallel_needs_tensor_parallel",
        ["parallel.sequence_parallel=true"],
        1,
        ["parallel.sequence_parallel=true", "parallel.tensor_parallel_size=1"],
    ),
    (
        "sequence_parallel_needs_tensor_parallel",
        [TP2, "parallel.sequence_parallel=true", "train.seq_length=255"],
        2,
        ["train.seq_length=255", "parallel.tensor_parallel_size=2", "254 or 256"],
    ),
    (
        "samples_split_over_context_parallel_ranks",
        [CP2, "train.seq_length=254"],
        2,
        ["train.seq_length=254", "parallel.context_parallel_size=2", "252 or 256"],
    ),
    (
        "samples_split_over_context_parallel_ranks",
        [CP2, "train.seq_length=192", "data.phases.1.seq_length=258"],
        2,
        ["data.phases[1].seq_length=258", "parallel.context_parallel_size=2", "256 or 260"],
    ),
    (
        "samples_split_over_context_parallel_ranks",
        [
            CP2,
            "parallel.tensor_parallel_size=5",
            "parallel.sequence_parallel=true",
            "train.seq_length=250",
            *(f"model.{name}=10" for name in ("num_attention_heads", "num_query_groups", "mamba_num_groups")),
            "model.vocab_size=2000",
        ],
        10,
        ["train.seq_length=250", "parallel.context_parallel_size=2", "parallel.tensor_parallel_size=5", "240 or 260"],
    ),
    (
        "mamba_heads_split_over_context_parallel_ranks",
        ["parallel.context_parallel_size=4"],
        4,
        ["model.mamba_num_heads=10", "parallel.context_parallel_size=4", "2 or 5", "8 or 12"],
    ),
    (
        "mamba_heads_split_over_context_parallel_ranks",
        [TP2, "parallel.context_parallel_size=4", "model.mamba_num_heads=24", "model.mamba_num_groups=6"],
        8,
        ["model.mamba_num_groups=6", "parallel.tensor_parallel_size=2", "parallel.context_parallel_size=4", "3 groups"],
    ),
    (
        "virtual_pipeline_needs_a_pipeline",
        ["parallel.virtual_pipeline_size=2"],
        1,
        ["parallel.virtual_pipeline_size=2", "parallel.pipeline_parallel_size"],
    ),
    (
        "parameter_gather_overlaps_with_gradient_reduction",
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
        1,
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
    ),
    (
        "tensor_parallel_overlap_has_what_it_needs",
        [OVERLAP],
        1,
        [OVERLAP, "parallel.tensor_parallel_size=1", "2 or more"],
    ),
    (
        "tensor_parallel_overlap_has_what_it_needs",
        [OVERLAP, TP2, "parallel.sequence_parallel=false"],
        2,
        [OVERLAP, "parallel.sequence_parallel=true, it is false"],
    ),
    (
        "tensor_parallel_overlap_has_what_it_needs",
        [OVERLAP, TP2, "parallel.sequence_parallel=true", "precision.format=fp8_block", "model.mamba_num_heads=16"],
        2,
        [OVERLAP, "precision.format=fp8_block", "bf16, fp8_current or fp8_delayed"],
    ),
    (
        "tensor_parallel_overlap_has_what_it_needs",
        [
            *(OVERLAP, TP2, "parallel.sequence_parallel=true", "model.mamba_num_heads=16"),
            *("precision.format=fp8_current", "precision.primary_weights=fp8"),
        ],
        2,
        [OVERLAP, "precision.primary_weights=fp8"],
    ),
    (
        "tensor_parallel_overlap_has_what_it_needs",
        [OVERLAP, TP2, "parallel.sequence_parallel=true", "precision.format=bf16"],
        2,
        ["model.hidden_size=160", OVERLAP, "multiple of the 64", "128 or 192"],
    ),
    (
        "tensor_parallel_overlap_has_what_it_needs",
        [OVERLAP, TP2, "parallel.sequence_parallel=true", "data.phases.0.seq_length=512"],
        2,
        [OVERLAP, "train.seq_length=256", "data.phases[0].seq_length=512"],
    ),
    (
        "batches_divide_among_ranks",
        [],
        3,
        ["train.global_batch_size=16", "24", "train.micro_batch_size=8", "3 data-parallel ranks", "Use 24"],
    ),
    (
        "batches_divide_among_ranks",
        ["train.batch_schedule=[{start_tokens: 9, global_batch_size: 20}]"],
        1,
        ["train.batch_schedule[0].global_batch_size=20", "multiple of 8", "16 or 24"],
    ),
    (
        "batches_divide_among_ranks",
        [PP2, "parallel.virtual_pipeline_size=2", "train.global_batch_size=24"],
        2,
        [
            "train.global_batch_size=24",
            "3 micro-batches",
            "parallel.pipeline_parallel_size=2",
            "parallel.virtual_pipeline_size=2",
            "16 or 32",
        ],
    ),
    (
        "batch_schedule_rises",
        ["train.batch_schedule=[{start_tokens: 9, global_batch_size: 8}, {start_tokens: 9, global_batch_size: 16}]"],
        1,
        ["train.batch_schedule[1].start_tokens=9", "train.batch_schedule[0].start_tokens (9)"],
    ),
    (
        "train_tokens_hold_a_step",
        ["train.train_tokens=4000", "lr.decay_tokens=10", "lr.warmup_tokens=0"],
        1,
        ["train.train_tokens=4000", "4096", "train.global_batch_size=16", "train.seq_length=256"],
    ),
    (
        "train_tokens_hold_a_step",
        ["train.train_tokens=4096", "data.phases.0.seq_length=512", "lr.decay_tokens=10", "lr.warmup_tokens=0"],
        1,
        ["train.train_tokens=4096", "8192", "train.global_batch_size=16", "data.phases[0].seq_length=512"],
    ),
    (
        "evaluation_has_something_to_read",
        ["data.sources.0.eval_prefixes=[]", "data.sources.1.eval_prefixes=[]", "data.sources.2.eval_prefixes=[]"],
        1,
        ["train.eval_every_steps=100", "eval_prefixes"],
    ),
    (
        "evaluation_has_something_to_read",
        ["train.eval_tokens=255"],
        1,
        ["train.eval_tokens=255", "train.seq_length=256"],
    ),
    ("schedule_has_its_keys_and_no_others", ["lr.min=null"], 1, ["lr.min", "lr.schedule=wsd", "lr=constant"]),
    *(
        ("graphs_repeat_every_step", [GRAPHS, *changes], ranks, [GRAPHS, clash])
        for changes, ranks, clash in (
            (["data.document_boundary=reset"], 1, "data.document_boundary=reset"),
            (["train.recompute=full"], 1, "train.recompute=full"),
            ([CP2], 2, CP2),
            (["parallel.overlap_param_gather=true"], 1, "parallel.overlap_param_gather=true"),
        )
    ),
    (
        "schedule_has_its_keys_and_no_others",
        ["lr.decay_tokens=null"],
        1,
        ["lr.decay_tokens", "lr.schedule=wsd", "lr=cosine"],
    ),
    ("schedule_has_its_keys_and_no_others", ["lr.decay_shape=null"], 1, ["lr.decay_shape", "lr.schedule=wsd"]),
    (
        "schedule_has_its_keys_and_no_others",
        ["lr.schedule=cosine"],
        1,
        ["lr.decay_tokens=491520 has no effect", "lr.decay_shape=minus_sqrt has no effect", "lr=wsd"],
    ),
    (
        "schedule_has_its_keys_and_no_others",
        ["lr.schedule=constant", "lr.decay_tokens=null", "lr.decay_shape=null"],
        1,
        ["lr.min=3e-05", "lr.schedule=constant", "lr=wsd or lr=cosine"],
    ),
    (
        "schedule_has_its_keys_and_no_others",
        ["lr.schedule=cosine", "lr.min=null", "lr.decay_tokens=null", "lr.decay_shape=null"],
        1,
        ["lr.min", "lr.schedule=cosine"],
    ),
    ("rate_falls_from_peak_to_min", ["lr.min=0.004"], 1, ["lr.min=0.004", "lr.peak=0.003"]),
    (
        "warmup_and_decay_fit_into_the_run",
        ["lr.warmup_tokens=2_000_000"],
        1,
        ["lr.warmup_tokens=2000000", "lr.decay_tokens=491520", "train.train_tokens=2457600"],
    ),
    (
        "warmup_and_decay_fit_into_the_run",
        ["lr.schedule=cosine", "lr.decay_tokens=null", "lr.decay_shape=null", "lr.warmup_tokens=2457600"],
        1,
        ["lr.warmup_tokens=2457600", "train.train_tokens=2457600"],
    ),
    ("source_names_are_unique", ["data.sources.1.name=code"], 1, ["data.sources", "2 sources", "'code'"]),
    ("source_names_are_unique", ["data.sources=[]"], 1, ["data.sources is empty", "data=NAME"]),
    ("phases_start_at_zero_and_rise", ["data.phases=[]"], 1, ["data.phases is empty"]),
    ("phases_start_at_zero_and_rise", ["data.phases.0.start_tokens=5"], 1, ["data.phases[0].start_tokens=5"]),
    (
        "phases_start_at_zero_and_rise",
        ["data.phases.1.start_tokens=0"],
        1,
        ["data.phases[1].start_tokens=0", "data.phases[0].start_tokens=0"],
    ),
    (
        "phases_weigh_known_sources_once",
        ["data.phases.0.weights.0.source=cod"],
        1,
        ["data.phases[0].weights", "'cod'", "code, tests, prose", "Did you mean code?"],
    ),
    (
        "phases_weigh_known_sources_once",
        ["data.phases.1.weights.0.source=tests"],
        1,
        ["data.phases[1].weights", "2 weights"],
    ),
    (
        "phases_weigh_known_sources_once",
        ["data.phases.0.weights=[{source: code, weight: 0}]"],
        1,
        ["data.phases[0].weights", "every weight is 0"],
    ),
    (
        "phases_weigh_known_sources_once",
        ["data.sources.2.prefixes=[]"],
        1,
        ["data.phases[0].weights", "'prose'", "no prefixes"],
    ),
    (
        "every_source_is_used",
        ["data.phases=[{start_tokens: 0, weights: [{source: code, weight: 1}]}]"],
        1,
        ["data.sources", "'tests'", "'prose'", "data.phases[].weights"],
    ),
    (
        "every_source_is_used",
        ["data.sources.2.prefixes=[]", "data.sources.2.eval_prefixes=[]"],
        1,
        ["'prose'", "neither prefixes nor eval_prefixes"],
    ),
    (
        "lengths_change_between_steps",
        ["data.phases.1.seq_length=512", "data.phases.1.start_tokens=1_000_000"],
        1,
        ["data.phases[1].start_tokens=1000000 is within a step", "256 and 512 tokens", "999424 and 1003520"],
    ),
    (
        "lengths_are_doublings_of_the_first",
        ["data.phases.1.seq_length=384"],
        1,
        ["data.phases[1].seq_length=384", "train.seq_length=256", "Use 256 or 512."],
    ),
    (
        "lengths_are_doublings_of_the_first",
        ["data.phases.0.seq_length=96"],
        1,
        ["train.seq_length=256", "data.phases[0].seq_length=96", "Use 192 or 384."],
    ),
    (
        "fill_in_the_middle_has_its_tokens",
        ["data.phases.0.weights.0.fim_rate=0.5", "data.fim_tokens=[a, b, a]"],
        1,
        ["fim_rate is above 0", "data.fim_tokens=['a', 'b', 'a']"],
    ),
    (
        "fill_in_the_middle_has_its_tokens",
        ["data.fim_tokens=[a, b, c]"],
        1,
        ["data.fim_tokens=['a', 'b', 'c'] has no effect"],
    ),
    (
        "resume_is_a_word_or_a_folder",
        ["checkpoint.resume=nevr"],
        1,
        ['checkpoint.resume="nevr"', "Did you mean never?"],
    ),
    (
        "old_checkpoints_are_kept_apart",
        ["checkpoint.keep_every_tokens=1000"],
        1,
        ["checkpoint.keep_every_tokens=1000", "checkpoint.keep_last=0"],
    ),
    (
        "saves_beside_training_are_periodic",
        ["checkpoint.asynchronous=true", "checkpoint.every_steps=0"],
        1,
        ["checkpoint.asynchronous=true", "checkpoint.every_steps=0"],
    ),
    ("allowed_changes_are_keys", ["checkpoint.allow_change=[lr.peek]"], 1, ["names lr.peek", "Did you mean lr.peak?"]),
    ("allowed_changes_are_keys", ["checkpoint.allow_change=['']"], 1, ["an empty key"]),
    ("names_are_not_empty", ["run.name=' '"], 1, ['run.name=" "']),
    ("names_are_not_empty", ["data.tokenizer=''"], 1, ['data.tokenizer=""']),
]


@pytest.mark.parametrize(("rule", "changes", "world_size", "expected"), BROKEN, ids=lambda value: str(value)[:60])
def test_a_broken_rule_says_what_clashes_and_what_to_change(
    rule: str, changes: list[str], world_size: int, expected: list[str]
) -> None:
    """Fails if the combination is let through, or the message lacks a value or a key."""
    config = config_with(*changes)
    with pytest.raises(ConfigError) as caught:
        check_rules(config, world_size)
    assert [part for part in expected if part not in str(caught.value)] == []
    own = [r for r in ALL_RULES if r.__name__ == rule]
    assert list(own[0](config, world_size)), f"{rule} did not speak"


def test_every_rule_is_broken_above() -> None:
    """Fails if a rule is added without a case that breaks it."""
    assert {rule.__name__ for rule in ALL_RULES} == {case[0] for case in BROKEN}


def test_all_broken_rules_are_reported_together() -> None:
    """Fails if the first violation hides the others."""
    config = config_with(TP2, "model.mamba_num_groups=5", "lr.min=1.0", "checkpoint.resume=x")
    with pytest.raises(ConfigError) as caught:
        check_rules(config, 5)
    assert str(caught.value).startswith("4 problems")


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ([], 1),
        ([], 2),
        ([TP2, "parallel.sequence_parallel=true"], 2),
        ([PP2, "parallel.virtual_pipeline_size=2"], 2),
        ([TP2, PP2], 4),
        ([CP2], 2),
        ([CP2, TP2, PP2, "parallel.sequence_parallel=true", "model.mamba_num_heads=12"], 8),
        ([CP4, "model.mamba_num_heads=16", "model.mamba_num_groups=2"], 4),
        ([CP2, "model.mamba_num_heads=16", "model.mamba_num_groups=4"], 2),
        (["parallel.pipeline_parallel_size=10"], 10),
        ([TP2, "parallel.sequence_parallel=true", "model.qkv_norm=qkv", "model.position_embedding=rope"], 2),
        (["model.position_embedding=learned", "model.max_position_embeddings=256", "model.layer_pattern=M-M-"], 1),
        # Keys of layers that the model does not have are not read.
        ([TP2, "model.layer_pattern='*-*-'", "model.mamba_num_groups=3", "model.mamba_num_heads=7"], 2),
        ([CP4, "model.layer_pattern='*-*-'", "model.mamba_num_heads=10"], 4),
        ([CP4, "model.layer_pattern='*-*-'", "model.mamba_num_heads=16", "model.mamba_num_groups=3"], 4),
        ([TP2, "model.layer_pattern=M*M*", "model.ffn_hidden_size=481"], 2),
        (["model.layer_pattern=M-M-", "model.num_attention_heads=4", "model.num_query_groups=3"], 1),
        (["checkpoint.resume=runs/a/checkpoints/step_000000100"], 1),
        (["checkpoint.allow_change=[lr,data.phases,train.batch_schedule]"], 1),
        (["checkpoint.keep_last=3", "checkpoint.keep_every_tokens=1000"], 1),
        (["train.train_tokens=600_000"], 1),  # phases that a short run never reaches are no mistake
        (["lr.schedule=constant", "lr.min=null", "lr.decay_tokens=null", "lr.decay_shape=null"], 1),
    ],
)
def test_what_can_work_is_let_through(changes: list[str], world_size: int) -> None:
    """Fails if a rule refuses a combination that runs."""
    check_rules(config_with(*changes), world_size)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train.micro_batch_size=0", "train.micro_batch_size=0 must be at least 1."),
        ("optim.adam_beta2=1.0", "optim.adam_beta2=1.0 must be at least 0 and below 1."),
        ("lr.peak=0", "lr.peak=0.0 must be above 0."),
        ("lr.peak=.nan", "lr.peak=nan must be above 0."),
        ("optim.clip_grad_norm=.inf", "optim.clip_grad_norm=inf must be at least 0."),
        ("data.phases.1.weights.2.weight=-1", "data.phases[1].weights[2].weight=-1.0 must be at least 0."),
        ("run.seed=-1", "run.seed=-1 must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused(change: str, expected: str) -> None:
    """Fails if a number that cannot work reaches the arithmetic, or a NaN passes a comparison."""
    with pytest.raises(ConfigError) as caught:
        check_rules(config_with(change), 1)
    assert expected in str(caught.value)


def test_every_number_has_a_range() -> None:
    """Fails if a numeric key is added without saying what it may be, or a range outlives its key."""
    assert {info.key for info in describe_keys() if info.type in WORDS} == set(RANGES)


@pytest.mark.parametrize("world_size", [0, -2])
def test_a_run_needs_a_rank(world_size: int) -> None:
    """Fails if the arithmetic is done for no ranks."""
    with pytest.raises(ConfigError, match="world_size"):
        check_rules(config_with(), world_size)
