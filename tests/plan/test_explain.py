"""What is said of a key is what the schema, the recipe and a second plan say."""

import inspect
import io
import re
import tokenize
from enum import Enum

import pytest

from nemotron_train.config import schema
from nemotron_train.config.keys import describe_keys
from nemotron_train.config.load import load_config
from nemotron_train.plan.explain import explain
from nemotron_train.plan.report import Machine
from nemotron_train.plan.run_plan import plan_run
from tests.plan.small import experiment_with

NANO = "nemotron_nano_12b_v2"


def explained(key: str, *changes: str) -> dict[str, str]:
    overrides = [f"experiment={NANO}", *changes]
    text = explain(key, experiment_with(NANO, *changes), 736, Machine(), overrides)
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


def test_meaning_range_and_value_are_told() -> None:
    """Fails if unit, range, default or the value of this run is lost."""
    rows = explained("lr.warmup_tokens")
    assert rows["lr.warmup_tokens"] == "linear from 0 to peak"
    assert rows["type"] == "whole number, at least 0"
    assert rows["default"] == "0"
    assert rows["here"] == "8,000,000,000"


def test_the_source_of_a_value_is_the_line_that_sets_it() -> None:
    """Fails if the recipe's comment, which holds the source, is not found: in the experiment, in a group it chooses, or
    on the command line."""
    assert explained("lr.warmup_tokens")["set by"].endswith("warmup_tokens: 8_000_000_000 # model card")
    assert explained("model.mamba_head_dim")["set by"] == "recipes/model/nemotron_nano_12b_v2.yaml: mamba_head_dim: 80"
    assert explained("train.seq_length", "train.seq_length=4096")["set by"] == "the command line"
    assert "set by" not in explained("optim.adam_epsilon")
    of_a_phase = "data.phases.1.start_tokens=1_024_000"
    text = explain(
        "data.phases[].start_tokens", load_config(["experiment=quickstart", of_a_phase]), 1, Machine(), [of_a_phase]
    )
    assert re.findall("set by +(.*)", text) == ["the command line"]


@pytest.mark.parametrize(
    ("key", "overrides", "file"),
    [
        ("train.seq_length", [f"experiment={NANO}"], "train/pretrain_8k"),
        ("train.seq_length", ["experiment=quickstart"], "train/small_cpu"),
        ("log.wandb", ["experiment='quickstart'", '+log="wandb_offline"'], "log/wandb_offline"),
        ("checkpoint.every_steps", [f"experiment={NANO}"], "checkpoint/periodic"),
        ("optim.weight_decay", [f"experiment={NANO}", "optim=adamw_unclipped"], "optim/adamw"),
        ("optim.clip_grad_norm", [f"experiment={NANO}", "optim=adamw_unclipped"], "optim/adamw_unclipped"),
        ("lr.schedule", [f"experiment={NANO}_long_context"], "lr/constant"),
        ("model.mamba_head_dim", [f"experiment={NANO}_long_context"], f"model/{NANO}"),
        ("train.train_tokens", [f"experiment={NANO}_long_context"], f"experiment/{NANO}_long_context"),
        ("lr.peak", ["experiment=quickstart_phases"], "experiment/quickstart"),
    ],
)
def test_the_file_that_has_the_last_word_is_named(key: str, overrides: list[str], file: str) -> None:
    """Fails if a group that every run has, the recipe that another starts from, or a quoted choice is passed over, or a
    file is named whose value another one replaces."""
    config = load_config([*overrides, "train.global_batch_size=96"])
    text = explain(key, config, 1 if "quickstart" in overrides[0] else 128, Machine(), overrides)
    (line,) = re.findall(r"set by +recipes/(.*)\.yaml: ", text)
    assert line == file


@pytest.mark.parametrize(
    ("key", "neighbour", "told"),
    [
        ("parallel.tensor_parallel_size", "with 8", "memory_gib_per_gpu"),
        ("train.train_tokens", "with 40,000,000,000,000", "num_steps 3,317,128 -> 6,634,256"),
        ("precision.bf16_last_layers", "with 4", "products in bf16 8 -> 12"),
        ("lr.peak", "with 0.0009", "learning rate"),
        ("train.recompute", "with full", "tokens_per_second_per_gpu"),
        ("model.vocab_size", "with 262,144", "parameters 12,310,001,152 -> 13,652,178,432"),
        ("model.num_query_groups", "with 4", "parameters"),
        ("optim.weight_decay", "with 0.2", "it acts while the run trains"),
        ("train.micro_batch_size", "with 2", "micro_batches 4 -> 2"),
        ("precision.primary_weights", "with fp8", "memory_gib_per_gpu"),
        ("train.deterministic", "with true", "it acts while the run trains"),
        ("lr.decay_tokens", "with 7,200,000,000,000", "learning rate"),
    ],
)
def test_a_neighbouring_value_is_planned(key: str, neighbour: str, told: str) -> None:
    """Fails if the change that a key makes to this run is not shown."""
    assert told in explained(key)[neighbour]


def test_a_neighbour_that_is_refused_says_why() -> None:
    """Fails if an impossible neighbour is passed over, or ends the answer."""
    assert explained("lr.schedule")["with constant"].startswith("refused: lr.")


def test_the_change_is_that_of_planning_the_neighbour() -> None:
    """Fails if numbers of the explanation are not those of the run with that value."""
    plan = plan_run(load_config([f"experiment={NANO}", "train.global_batch_size=368"]), 736)
    rows = explained("train.global_batch_size")
    assert f"num_steps 3,317,128 -> {plan.num_steps:,}" in rows["with 368"]


def test_every_key_has_words_of_its_own() -> None:
    """Fails if a key is added whose comment, which is all the manual there is, is missing."""
    assert {info.key for info in describe_keys() if not info.comment} == set()


def test_every_commented_choice_is_told() -> None:
    """Fails if a choice's comment is lost: written where `config/keys.py` does not find it, or hidden by the key's."""
    told = " ".join(info.comment for info in describe_keys())
    kinds = [kind for kind in vars(schema).values() if isinstance(kind, type) and kind.__module__ == schema.__name__]
    comments = [
        token.string.removeprefix("# ")
        for kind in kinds
        if issubclass(kind, Enum)
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(kind)).readline)
        if token.type == tokenize.COMMENT
    ]
    assert len(comments) > 20
    assert [comment for comment in comments if comment not in told] == []


@pytest.mark.parametrize("key", ["run.dir", "log.wandb", "data.phases", "data.sources[].name", "train.batch_schedule"])
def test_keys_without_neighbouring_numbers_are_explained(key: str) -> None:
    """Fails if text, a list, or a key inside a list's elements ends in a traceback."""
    assert explained(key)["type"]


def test_a_list_is_not_written_out() -> None:
    """Fails if the blend of three phases buries the answer."""
    assert explained("data.phases")["here"] == "3 entries"
