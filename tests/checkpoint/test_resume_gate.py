"""Every key of the schema is either free to change, with a reason, or its change is refused with both values."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.checkpoint.commit import Commit
from nemotron_train.checkpoint.resume_gate import (
    EFFECTS,
    Effect,
    changes_on_resume,
    check_configuration,
    model_facts,
)
from nemotron_train.config.keys import describe_keys, plain
from nemotron_train.config.load import fingerprint, load_config
from nemotron_train.config.schema import LrSchedule, RunConfig
from nemotron_train.config.typed import read_run_config
from nemotron_train.errors import CheckpointError
from nemotron_train.plan.run_rules import allowed_changes_are_keys
from tests.small_runs import small_config

CONSUMED = 1_024  # tokens: the first phase has begun, the second (at 2,560) has not
TEXTS = {  # values that a random text would not be
    "model.layer_pattern": "M-M*-M-*",
    "checkpoint.resume": "never",
}


def config_of_test(**sections: Any) -> RunConfig:
    sections = {"train": {"batch_schedule": []}, **sections}
    config = small_config(Path("corpus"), Path("run"), **sections)
    tree = plain(config)
    tree["train"]["batch_schedule"] = [{"start_tokens": 5_120, "global_batch_size": 16}]
    return read_run_config(tree)


def commit_of(config: RunConfig, consumed_tokens: int = CONSUMED) -> Commit:
    return Commit(
        step=4, consumed_tokens=consumed_tokens, skipped_steps=0, origin=None, model=model_facts(config.model),
        config_fingerprint=fingerprint(config), data_hash="", layout={}, versions={}, files={}, config=plain(config),
    )  # fmt: skip


def other_value(key: str, kind: str, value: Any) -> Any:
    """A value of the same type that differs."""
    if key in TEXTS:
        return TEXTS[key]
    choices = kind.removesuffix(" or null").split(" | ")
    if len(choices) > 1:
        return next(choice for choice in choices if choice != value)
    kind = choices[0]
    if kind == "true or false":
        return not value
    if kind == "list of text":
        return [*value, "run.name"]
    if kind == "text":
        return f"{value}x"
    return (value or 0) + {"whole number": 1, "number": 0.125}[kind]


def leaves(tree: Any, key: str = "") -> dict[str, tuple[list[Any], Any]]:
    """Every value that can be set, by the path to it."""
    found: dict[str, tuple[list[Any], Any]] = {}

    def walk(value: Any, path: list[Any]) -> None:
        schema_key = re.sub(r"\.\[\]", "[]", ".".join("[]" if isinstance(p, int) else p for p in path))
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, [*path, name])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                walk(inner, [*path, index])
        else:
            found.setdefault(f"{schema_key}", (path, value))

    walk(tree, [])
    return found


def mutated(config: RunConfig, path: list[Any], value: Any) -> RunConfig:
    tree = plain(config)
    place = tree
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return read_run_config(tree)


def as_advised(config: RunConfig, message: str) -> RunConfig:
    """The configuration with what the message says to add, pasted into a shell as it stands there."""
    (pasted,) = re.findall(r"'checkpoint\.allow_change=.*?'", message)
    typed = load_config(shlex.split(f"experiment=quickstart {pasted}"))
    assert not list(allowed_changes_are_keys(typed, world_size=1))
    return replace(config, checkpoint=replace(config.checkpoint, allow_change=typed.checkpoint.allow_change))


KINDS = {info.key: info.type for info in describe_keys()}
LEAVES = leaves(plain(config_of_test()))
LISTS = {"data.sources", "data.phases", "data.phases[].weights", "train.batch_schedule"}


def test_every_key_has_its_place_in_the_table_and_every_reason_its_key() -> None:
    """Fails if a key was added to the schema without saying what changing it does to a run that has begun."""
    assert set(EFFECTS) == set(KINDS)
    assert set(LEAVES) == set(KINDS) - LISTS
    assert all(len(reason) > 10 for _, reason in EFFECTS.values())


@pytest.mark.parametrize("key", LEAVES)
def test_no_change_of_a_key_is_silent(key: str) -> None:
    """Fails if a key that changes the run can be changed without naming it, a free one is refused, or the message
    leaves out a value."""
    config = config_of_test()
    path, value = LEAVES[key]
    changed = mutated(config, path, other := other_value(key, KINDS[key], value))
    commit, effect = commit_of(config), EFFECTS[key][0]
    check_configuration(commit, config, is_new_run=False)
    if effect is Effect.none:
        check_configuration(commit, changed, is_new_run=False)
        assert changes_on_resume(commit, changed, is_new_run=False) == {}
        return
    with pytest.raises(CheckpointError) as refused:
        check_configuration(commit, changed, is_new_run=False)
    said = str(refused.value)
    shown = re.sub(r"\[[^\]]*\]", "[]", said)
    if key.endswith("].source"):  # by which weights are told apart: one has gone, another come
        assert "data.phases[].weights[]" in shown
    else:
        assert key in shown
        assert (f"{value}" if value is not None else "nothing") in said
    assert f"{other}" in said
    if effect in (Effect.later, Effect.length):
        allowing = as_advised(changed, said)
        check_configuration(commit, allowing, is_new_run=False)
        assert changes_on_resume(commit, allowing, is_new_run=False)
    else:
        assert "checkpoint.allow_change" not in said
        allowing = replace(changed, checkpoint=replace(changed.checkpoint, allow_change=[key.split("[")[0]]))
        with pytest.raises(CheckpointError):
            check_configuration(commit, allowing, is_new_run=False)


def test_the_advice_names_all_that_may_be_allowed_at_once() -> None:
    """Fails if pasting the advice takes back what was named already, or leaves a second key to be refused, or names
    one that cannot be allowed."""
    commit, config = commit_of(config_of_test()), config_of_test(checkpoint={"allow_change": ["optim.adam_beta2"]})
    for key, value in (("data.sources[].prefixes", ["x"]), ("train.train_tokens", 1), ("optim.adam_beta2", 0.5)):
        config = mutated(config, LEAVES[key][0], value)
    with pytest.raises(CheckpointError) as refused:
        check_configuration(commit, mutated(config, ["run", "seed"], 9), is_new_run=False)
    allowing = as_advised(config, str(refused.value))
    check_configuration(commit, allowing, is_new_run=False)
    assert "run.seed" not in allowing.checkpoint.allow_change


def test_a_key_of_another_version_is_allowed_with_its_section() -> None:
    """Fails if a checkpoint with a key that is no more can only be gone on from by editing it."""
    config = config_of_test()
    commit = commit_of(config)
    commit = replace(commit, config={**commit.config, "optim": {**commit.config["optim"], "of_old": 1}})
    with pytest.raises(CheckpointError, match=r"optim\.of_old: 1 then") as refused:
        check_configuration(commit, config, is_new_run=False)
    check_configuration(commit, as_advised(config, str(refused.value)), is_new_run=False)


def test_what_changes_a_run_is_not_free() -> None:
    """Fails if the table calls a schedule, a batch, the data's past, a precision, a length, a seed or the optimizer
    free: written here a second time on purpose."""
    free = {key for key, (effect, _) in EFFECTS.items() if effect is Effect.none}
    sections = ("lr.", "optim.", "precision.", "data.phases", "train.batch_schedule")
    assert not [key for key in free if key.startswith(sections)]
    assert not free & {
        "run.seed", "train.seq_length", "train.global_batch_size", "train.train_tokens", "data.tokenizer",
        "data.document_boundary", "data.fim_tokens", "data.fim_spm_rate", "data.sources[].prefixes",
    }  # fmt: skip
    assert {key for key in free if key.startswith("model.")} == {
        "model.mamba_chunk_size", "model.initialization", "model.init_std",
    }  # fmt: skip


@pytest.mark.parametrize("named", ["lr", "lr.peak"])
def test_a_section_allows_its_keys_and_no_others(named: str) -> None:
    """Fails if a prefix allows too little, or a name that another key begins with."""
    config, commit = config_of_test(), commit_of(config_of_test())
    allow = {"allow_change": [named]}
    check_configuration(commit, config_of_test(lr={"peak": 1e-3}, checkpoint=allow), is_new_run=False)
    with pytest.raises(CheckpointError, match=r"optim\.weight_decay"):
        check_configuration(
            commit, config_of_test(lr={"peak": 1e-3}, optim={"weight_decay": 0.2}, checkpoint=allow), is_new_run=False
        )
    assert changes_on_resume(commit, config_of_test(lr={"peak": 1e-3}, checkpoint=allow), is_new_run=False) == {
        "lr.peak": [config.lr.peak, 1e-3]
    }


def test_phases_that_have_not_begun_may_change_and_are_remembered() -> None:
    """Fails if the future of the blend is frozen, its past is not, or a change of it leaves no trace."""
    config = config_of_test()
    commit = commit_of(config)
    later = mutated(config, ["data", "phases", 1, "weights", 0, "weight"], 0.5)
    check_configuration(commit, later, is_new_run=False)
    assert changes_on_resume(commit, later, is_new_run=False) == {"data.phases[1].weights[a].weight": [0.2, 0.5]}
    without = replace(config, data=replace(config.data, phases=config.data.phases[:1]))
    check_configuration(commit, without, is_new_run=False)
    begun = commit_of(config, consumed_tokens=2_816)
    for changed in (later, without):
        with pytest.raises(CheckpointError, match=r"data\.phases\[1\].*has begun"):
            check_configuration(begun, changed, is_new_run=False)
    earlier = mutated(config, ["data", "phases", 1, "start_tokens"], 512)
    with pytest.raises(CheckpointError, match=r"data\.phases\[1\]\.start_tokens: 2560 then, 512 now"):
        check_configuration(commit, earlier, is_new_run=False)


def test_a_constant_rate_may_be_held_longer() -> None:
    """Fails if a run whose learning rate knows no end cannot be prolonged without naming it."""
    constant = {"schedule": LrSchedule.constant, "min": None, "decay_tokens": None, "decay_shape": None}
    commit = commit_of(config_of_test(lr=constant))
    longer = replace(config_of_test(lr=constant), train=replace(config_of_test().train, train_tokens=999_999))
    check_configuration(commit, longer, is_new_run=False)
    assert list(changes_on_resume(commit, longer, is_new_run=False)) == ["train.train_tokens"]


def test_pipeline_cuts_are_layout() -> None:
    """Fails if a `|` in the pattern counts as another model."""
    commit = commit_of(config_of_test())
    check_configuration(commit, config_of_test(model={"layer_pattern": "M-M*|-M-M"}), is_new_run=False)


def test_a_new_run_from_a_checkpoint_brings_everything_but_the_model() -> None:
    """Fails if a long-context phase in a run of its own must have its parent's schedule, or may have another model."""
    commit = commit_of(config_of_test())
    other = config_of_test(lr={"peak": 1e-5}, run={"seed": 9}, optim={"weight_decay": 0.0})
    check_configuration(commit, other, is_new_run=True)
    assert changes_on_resume(commit, other, is_new_run=True) == {}
    with pytest.raises(CheckpointError, match=r"model\.hidden_size: 32 then, 64 now"):
        check_configuration(commit, config_of_test(model={"hidden_size": 64}), is_new_run=True)


def test_a_key_that_the_checkpoint_did_not_know_had_its_default() -> None:
    """Fails if a checkpoint of an older version is refused for a key that was added with the old behaviour as
    default, or let through with another value."""
    config = config_of_test()
    commit = commit_of(config)
    del commit.config["optim"]["moments"]
    check_configuration(commit, config, is_new_run=False)
    with pytest.raises(CheckpointError, match=r'optim\.moments: "fp32" then, "bf16" now'):
        check_configuration(commit, mutated(config, ["optim", "moments"], "bf16"), is_new_run=False)


def test_a_part_of_the_model_that_the_checkpoint_did_not_know_was_not_there() -> None:
    """Fails if weights that an older version trained without a part go on with it, because nothing names it."""
    config = config_of_test()
    commit = commit_of(config)
    for model in (commit.model, commit.config["model"]):
        del model["position_embedding"]
    check_configuration(commit, config, is_new_run=True)
    for is_new_run in (True, False):
        with pytest.raises(CheckpointError, match=r'model\.position_embedding: "none" then, "rope" now'):
            check_configuration(commit, mutated(config, ["model", "position_embedding"], "rope"), is_new_run=is_new_run)
