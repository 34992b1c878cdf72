"""What the command line may say, and what it answers when it may not."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_train.config.keys import describe_keys
from nemotron_train.config.load import (
    fingerprint,
    list_choices,
    list_groups,
    load_config,
    read_resolved,
    write_resolved,
)
from nemotron_train.config.schema import DecayShape, LrSchedule, RunConfig, WandbMode
from nemotron_train.errors import ConfigError

QUICKSTART = "experiment=quickstart"


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([QUICKSTART, *overrides])
    return str(caught.value)


def test_values_arrive_typed_and_frozen() -> None:
    """Fails if an override is lost, a list or enum stays a plain YAML value, or a section can be written to."""
    config = load_config(
        [
            QUICKSTART,
            "lr.decay_shape=linear",
            "train.train_tokens=5_000_000",
            "log.wandb=off",
            "optim.clip_grad_norm=2",
            "train.batch_schedule=[{start_tokens: 1000, global_batch_size: 32}]",
        ]
    )
    assert config.lr.decay_shape is DecayShape.linear
    assert config.log.wandb is WandbMode.off
    assert config.train.train_tokens == 5_000_000
    assert config.optim.clip_grad_norm == 2.0
    assert isinstance(config.optim.clip_grad_norm, float)
    assert config.train.batch_schedule[0].global_batch_size == 32
    assert config.data.phases[1].weights[2].source == "prose"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.seq_length = 1  # type: ignore[misc]


def test_the_command_line_wins_over_experiment_and_experiment_over_groups() -> None:
    """Fails if the order of precedence changes: group < experiment < command line."""
    assert load_config([QUICKSTART]).checkpoint.every_steps == 50  # group: 500, experiment: 50
    assert load_config([QUICKSTART, "checkpoint=at_end"]).checkpoint.every_steps == 50
    assert load_config([QUICKSTART, "checkpoint.every_steps=7"]).checkpoint.every_steps == 7
    assert load_config([QUICKSTART, "lr=cosine"]).lr.schedule is LrSchedule.cosine


def test_interpolations_follow_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `${...}` is left as text, or follows the value before an override."""
    monkeypatch.setenv("CORPUS", "/somewhere")
    config = load_config([QUICKSTART, "run.name=other", "data.path=${oc.env:CORPUS}/text"])
    assert config.run.dir == "runs/other"
    assert config.data.path == "/somewhere/text"


@pytest.mark.parametrize("form", ["train.eval_tokens=99", "+train.eval_tokens=99", "++train.eval_tokens=99"])
def test_hydra_prefixes_all_set_a_key(form: str) -> None:
    """Fails if `+` or `++` is refused for a key that the chosen files do or do not mention."""
    assert load_config([QUICKSTART, form]).train.eval_tokens == 99


def test_a_deleted_key_falls_back_to_the_schema() -> None:
    """Fails if `~key` does not bring the default back."""
    assert load_config([QUICKSTART, "~train.eval_tokens"]).train.eval_tokens == 1_000_000


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('model.hidden_size="3072"', ['model.hidden_size="3072"', "text", "whole number", "quotes"]),
        ("model.hidden_size='3072'", ['model.hidden_size="3072"', "quotes"]),
        ('lr.peak="1e-3"', ['lr.peak="1e-3"', "expected number", "quotes"]),
        ("train.train_tokens=2e6", ["train.train_tokens=2000000.0", "Write 2000000."]),
        ("train.seq_length=25.5", ["train.seq_length=25.5", "whole number"]),
        ("train.seq_length=long", ['train.seq_length="long"', "whole number"]),
        ("train.seq_length=true", ["train.seq_length=true", "whole number"]),
        ("parallel.sequence_parallel=1", ["parallel.sequence_parallel=1", "true or false"]),
        ("lr.peak=null", ["lr.peak=null", "number"]),
        ("data.phases=3", ["data.phases=3", "expected list"]),
        ("data.phases.0.start_tokens=x", ['data.phases[0].start_tokens="x"', "whole number"]),
        ("data.sources.0.prefixes=[3.5]", ["data.sources[0].prefixes[0]=3.5", "text"]),
        ("lr.schedule=wds", ['lr.schedule="wds"', "wsd, cosine, constant", "Did you mean wsd?"]),
        ("train.recompute=false", ["train.recompute=false", "none, selective, full"]),
        ("run.name=???", ["run.name: no value"]),
        ("data.path=${oc.env:SURELY_NOT_SET}", ["data.path", "SURELY_NOT_SET"]),
        ("run.name=${run.nam}", ["run.name", "run.nam"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(override: str, expected: list[str]) -> None:
    """Fails if a value of the wrong type is converted in silence, or the message hides key, value or remedy."""
    message = error_of(override)
    assert [part for part in expected if part not in message] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.train_token=5", ["train.train_token is not a key", "Did you mean train.train_tokens?"]),
        ("trian.seq_length=5", ["trian.seq_length is not a key", "Did you mean train.seq_length?"]),
        ("train.peak=5", ["train.peak is not a key", "Did you mean lr.peak?"]),
        ("+train.new_key=5", ["train.new_key is not a key"]),
        ("modle=quickstart", ["modle is not a key", "Did you mean model?"]),
        ("hydra.run.dir=x", ["hydra.run.dir", "no effect"]),
        ("lr=cosin", ["lr=cosin", "constant, cosine, wsd", "Did you mean cosine?"]),
        ("model={hidden_size: 5}", ["model.KEY=VALUE"]),
        ("data.phases=[{start_tokens: 0, wieghts: []}]", ["data.phases[0].wieghts", "data.phases[].weights?"]),
        ("--help", ["--help", "key=value"]),
        ("foo", ["'foo'", "key=value"]),
        ("train.seq_length=1,2", ["one value"]),
    ],
)
def test_an_unknown_key_or_group_is_refused_with_the_nearest(override: str, expected: list[str]) -> None:
    """Fails if a typo is ignored, or is reported without what was probably meant."""
    message = error_of(override)
    assert [part for part in expected if part not in message] == []


def test_all_problems_are_reported_together() -> None:
    """Fails if the first problem hides the others."""
    message = error_of('model.hidden_size="3072"', "train.train_token=5", "lr.schedule=wds", "optim.adam_beta1=high")
    assert message.startswith("4 problems")
    for key in ("model.hidden_size", "train.train_token", "lr.schedule", "optim.adam_beta1"):
        assert key in message


def test_missing_values_are_named_with_the_group_that_sets_them(tmp_path: Path) -> None:
    """Fails if a value that nothing set goes on as `???`, or its section's group is not suggested."""
    path = tmp_path / "partial.yaml"
    path.write_text("run: {name: x}\n")
    with pytest.raises(ConfigError) as caught:
        read_resolved(path)
    for part in ("model.layer_pattern", "model=NAME", "lr.schedule", "lr=NAME", "data.path", "train.train_tokens"):
        assert part in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["model=quickstart"], ["experiment=null"]])
def test_without_an_experiment_the_error_lists_them(arguments: list[str]) -> None:
    """Fails if a run can be composed of nothing, or the user is not told what there is."""
    with pytest.raises(ConfigError, match="quickstart"):
        load_config(arguments)


def test_resolved_yaml_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    """Fails if writing loses a value, changes a type, or leaves a temporary file."""
    overrides = [
        "model.layer_pattern=*-M|M",
        "run.name=12",
        "lr.peak=1e-05",
        "optim.adam_epsilon=1e-15",
        "log.wandb=off",
    ]
    config = load_config([QUICKSTART, *overrides])
    path = tmp_path / "run" / "resolved.yaml"
    write_resolved(config, path)
    assert read_resolved(path) == config
    assert fingerprint(read_resolved(path)) == fingerprint(config)
    assert [file.name for file in path.parent.iterdir()] == ["resolved.yaml"]


def test_a_damaged_resolved_yaml_is_refused_with_its_path(tmp_path: Path) -> None:
    """Fails if a file that is not YAML, not ours, or not there ends in a traceback."""
    for name, text in (("not_yaml", "a: [1"), ("not_ours", "a: 1"), ("list", "- 1"), ("empty", "")):
        (tmp_path / name).write_text(text)
    for name in ("not_yaml", "not_ours", "list", "empty", "not_there"):
        with pytest.raises(ConfigError, match=name):
            read_resolved(tmp_path / name)


def test_the_fingerprint_changes_with_every_value_and_with_nothing_else() -> None:
    """Fails if two different configurations look the same to the ranks, or one looks different twice."""
    base = fingerprint(load_config([QUICKSTART]))
    assert fingerprint(load_config([QUICKSTART])) == base
    changes = (
        "run.seed=1",
        "lr.peak=2.9e-3",
        "lr.decay_shape=linear",
        "data.phases.1.start_tokens=5",
        "lr.decay_tokens=null",
    )
    assert len({base, *(fingerprint(load_config([QUICKSTART, change])) for change in changes)}) == len(changes) + 1


def test_composing_touches_neither_the_folder_nor_the_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Hydra writes its output folder or installs its log handlers."""
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    load_config([QUICKSTART])
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger().handlers == handlers


def test_every_group_is_a_section_of_the_schema() -> None:
    """Fails if a group is misspelled (its values would land nowhere) or a choice of it does not compose."""
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(list_groups()) - {"experiment"} <= sections
    for group in set(list_groups()) - {"experiment"}:
        for choice in list_choices(group):
            load_config([QUICKSTART, f"{group}={choice}", "data.path=somewhere"])


def test_the_keys_listing_has_comments_types_and_defaults() -> None:
    """Fails if the manual in schema.py's comments is no longer found."""
    keys = {info.key: info for info in describe_keys()}
    assert keys["lr.decay_shape"].type == "linear | cosine | exponential | minus_sqrt or null"
    assert keys["train.micro_batch_size"].default == 1
    assert "speed and memory only" in keys["train.micro_batch_size"].comment
    assert "data.phases[].weights[].weight" in keys


def test_recipes_travel_with_an_installed_package(tmp_path: Path) -> None:
    """Fails if the YAML files are not package data, or are looked for next to the working directory."""
    pytest.importorskip("setuptools", minversion="77")  # what pyproject.toml asks of a build
    root = Path(__file__).parents[2]
    build = (
        "import setuptools, sys; sys.argv = ['setup.py', '-q', 'build', '--build-base', sys.argv[1] + '/base', "
        "'--build-lib', sys.argv[1] + '/lib', 'egg_info', '--egg-base', sys.argv[1]]; setuptools.setup()"
    )
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=root, check=True, capture_output=True)
    compose = "import recipes; from nemotron_train.plan.__main__ import main; print(recipes.__file__); main(['%s'])"
    result = subprocess.run(
        [sys.executable, "-c", compose % QUICKSTART],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in result.stdout
    assert "2,048" in result.stdout
