"""What may differ between the configuration of a checkpoint and the one that goes on from it?

Every key of the schema is in one table, with what a change of it does to a run that has begun. A difference is let
through if it cannot change the run's numbers, refused with both values if it can, and let through and remembered if
the user names its key in `checkpoint.allow_change`.

A run that starts from a checkpoint it was pointed to (`checkpoint.resume=FOLDER`), or from imported weights, is a new
run with its own data, batch and rates: only the model must be the checkpoint's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from nemotron_train.checkpoint.commit import Commit
from nemotron_train.config.keys import default_tree, plain
from nemotron_train.config.schema import LrSchedule, ModelSection, RunConfig
from nemotron_train.errors import CheckpointError


class Effect(Enum):
    """What changing a key does to a run that has begun."""

    none = "none"  # nothing that a step computes
    later = "later"  # the coming steps: must be named
    past = "past"  # what is already done would be wrong: cannot be allowed
    phases = "phases"  # `past` for phases that have begun, announced and let through for those that have not
    length = "length"  # `later` where the learning rate ends at train_tokens, else only how long the run is


_LAYOUT = (Effect.none, "how the work is spread over ranks")
_SHAPE = (Effect.past, "the shape of the weights")
_COMPUTED = (Effect.later, "what the same weights compute")
_UPDATE = (Effect.later, "how weights are updated")
_RATE = (Effect.later, "the learning rate of the coming steps")
_TOKENS = (Effect.later, "the tokens of the coming steps")
_STOP = (Effect.none, "when a run stops, not what its steps compute")
_SHOWN = (Effect.none, "what is shown or measured")
_SAVED = (Effect.none, "when and where is saved")
_START = (Effect.none, "the first weights, which the checkpoint replaces")
_PRECISION = (Effect.later, "what the products are computed in")
_PHASE = (Effect.phases, "the tokens of a phase")

EFFECTS: dict[str, tuple[Effect, str]] = {
    "run.name": _SHOWN,
    "run.dir": _SAVED,
    "run.seed": (Effect.past, "the order of the tokens, those already read included"),
    "model.layer_pattern": (Effect.past, "the layers; `|`, which cuts the pipeline, may change"),
    "model.hidden_size": _SHAPE,
    "model.ffn_hidden_size": _SHAPE,
    "model.num_attention_heads": _SHAPE,
    "model.num_query_groups": _SHAPE,
    "model.attention_head_dim": _SHAPE,
    "model.mamba_num_heads": _SHAPE,
    "model.mamba_head_dim": _SHAPE,
    "model.mamba_num_groups": _SHAPE,
    "model.mamba_state_dim": _SHAPE,
    "model.mamba_conv_kernel": _SHAPE,
    "model.mamba_chunk_size": (Effect.none, "speed and memory of the scan"),
    "model.vocab_size": _SHAPE,
    "model.tied_embeddings": _SHAPE,
    "model.norm": _SHAPE,
    "model.norm_epsilon": _COMPUTED,
    "model.linear_bias": _SHAPE,
    "model.position_embedding": (Effect.past, "where the weights that were learned found the order of the tokens"),
    "model.max_position_embeddings": _SHAPE,
    "model.rope_base": _COMPUTED,
    "model.qkv_norm": _SHAPE,
    "model.output_norm": _SHAPE,
    "model.attention_logit_scale": _COMPUTED,
    "model.attention_logit_cap": _COMPUTED,
    "model.layer_scale": _SHAPE,
    "model.initialization": _START,
    "model.init_std": _START,
    "parallel.tensor_parallel_size": _LAYOUT,
    "parallel.pipeline_parallel_size": _LAYOUT,
    "parallel.virtual_pipeline_size": _LAYOUT,
    "parallel.context_parallel_size": _LAYOUT,
    "parallel.sequence_parallel": _LAYOUT,
    "parallel.overlap_grad_reduce": _LAYOUT,
    "parallel.overlap_param_gather": _LAYOUT,
    "parallel.overlap_tensor_comm": _LAYOUT,
    "parallel.timeout_seconds": _STOP,
    "precision.format": _PRECISION,
    "precision.bf16_first_layers": _PRECISION,
    "precision.bf16_last_layers": _PRECISION,
    "precision.fp8_scales": _PRECISION,
    "precision.primary_weights": _PRECISION,
    "data.path": (Effect.none, "where the shards lie; the hash of the plan compares what was read of them"),
    "data.tokenizer": (Effect.later, "what the tokens mean"),
    "data.sources": (Effect.none, "which sources there are; the hash of the plan compares what was read of them"),
    "data.sources[].name": (Effect.none, "see data.sources"),
    "data.sources[].prefixes": _TOKENS,
    "data.sources[].eval_prefixes": _SHOWN,
    "data.phases": _PHASE,
    "data.phases[].start_tokens": _PHASE,
    "data.phases[].weights": _PHASE,
    "data.phases[].weights[].source": _PHASE,
    "data.phases[].weights[].weight": _PHASE,
    "data.phases[].weights[].fim_rate": _PHASE,
    "data.phases[].seq_length": _PHASE,
    "data.document_boundary": _TOKENS,
    "data.eod_token": _TOKENS,
    "data.fim_spm_rate": _TOKENS,
    "data.fim_tokens": _TOKENS,
    "data.max_epochs": _STOP,
    "optim.adam_beta1": _UPDATE,
    "optim.adam_beta2": _UPDATE,
    "optim.adam_epsilon": _UPDATE,
    "optim.weight_decay": _UPDATE,
    "optim.clip_grad_norm": _UPDATE,
    "optim.gradients": _UPDATE,
    "optim.moments": _UPDATE,
    "lr.schedule": _RATE,
    "lr.peak": _RATE,
    "lr.min": _RATE,
    "lr.warmup_tokens": _RATE,
    "lr.decay_tokens": _RATE,
    "lr.decay_shape": _RATE,
    "train.train_tokens": (Effect.length, "where the learning rate ends"),
    "train.seq_length": (Effect.past, "how the tokens, those already read included, are cut into samples"),
    "train.global_batch_size": (Effect.later, "how many samples a step averages"),
    "train.micro_batch_size": _LAYOUT,
    "train.cuda_graphs": (Effect.none, "how passes are started, and where a pipeline cuts itself by planned times"),
    "train.batch_schedule": (Effect.later, "how many samples a step averages"),
    "train.batch_schedule[].start_tokens": (Effect.later, "how many samples a step averages"),
    "train.batch_schedule[].global_batch_size": (Effect.later, "how many samples a step averages"),
    "train.eval_every_steps": _SHOWN,
    "train.eval_tokens": _SHOWN,
    "train.recompute": (Effect.none, "memory and speed"),
    "train.deterministic": (Effect.none, "in which order numbers are added, within what rounding allows"),
    "train.max_skipped_steps": _STOP,
    "checkpoint.every_steps": _SAVED,
    "checkpoint.resume": _SAVED,
    "checkpoint.asynchronous": _SAVED,
    "checkpoint.keep_last": _SAVED,
    "checkpoint.keep_every_tokens": _SAVED,
    "checkpoint.allow_change": (Effect.none, "names differences, and is none"),
    "log.every_steps": _SHOWN,
    "log.wandb": _SHOWN,
    "log.wandb_project": _SHOWN,
}
_UNKNOWN = (Effect.later, "a key of another version")
_ABSENT = None  # stands for an element or key that one of the two does not have
_PHASE_NUMBER = re.compile(r"data\.phases\[(\d+)\]")


@dataclass(frozen=True)
class Difference:
    key: str  # elements of lists by name, or by number: data.sources[web].prefixes
    then: Any
    now: Any

    @property
    def schema_key(self) -> str:
        """The key as the schema lists it: an element that is there or not is a difference of the list."""
        return re.sub(r"\[[^\]]*\]", "[]", self.key).removesuffix("[]")


def model_facts(model: ModelSection) -> dict[str, object]:
    """The keys of a model that its weights, or what they compute, depend on. Pipeline cuts in the pattern are not among
    them."""
    facts = {key: value for key, value in plain(model).items() if EFFECTS[f"model.{key}"][0] is not Effect.none}
    facts["layer_pattern"] = model.layer_pattern.replace("|", "")
    return facts


def model_of(commit: Commit) -> dict[str, Any]:
    """The facts of a checkpoint's model. One that was written before a key existed had what is the key's default."""
    defaults = default_tree(ModelSection)
    later = {key: value for key, value in defaults.items() if EFFECTS[f"model.{key}"][0] is not Effect.none}
    return {**{key: value for key, value in later.items() if value != MISSING}, **commit.model}


def check_configuration(commit: Commit, config: RunConfig, *, is_new_run: bool) -> None:
    """Refuse to go on from a checkpoint with a configuration that changes its run.

    Raises:
        CheckpointError: lists every difference that is refused, with both values.
    """
    refused = [
        (difference, effect, reason)
        for difference in differences(commit, config, is_new_run=is_new_run)
        for effect, reason in [effect_of(difference, commit, config)]
        if effect is Effect.past or (effect is Effect.later and not is_allowed(difference, config))
    ]
    if not refused:
        return
    lines = [f"- {d.key}: {_show(d.then)} then, {_show(d.now)} now ({reason})" for d, _, reason in refused]
    can_allow = [_allowed_with(difference.schema_key) for difference, effect, _ in refused if effect is Effect.later]
    advice = "Restore them."
    if can_allow:
        named = dict.fromkeys([*config.checkpoint.allow_change, *can_allow])
        # In quotes, for a shell and for Hydra, to which `[` in a bare word is the start of a list.
        value = json.dumps(list(named), separators=(",", ":"))
        advice = f"Restore them, or say which are on purpose: 'checkpoint.allow_change={value}'."
    if len(can_allow) < len(refused):
        advice += (
            " What would make the past another one cannot be allowed; start a new run from this checkpoint for it."
        )
    raise CheckpointError(
        f"The checkpoint of step {commit.step} was made with another configuration:\n" + "\n".join([*lines, advice])
    )


def _allowed_with(key: str) -> str:
    """Name what `checkpoint.allow_change` takes for a key: of one that this version does not have, the section."""
    return key if key in EFFECTS else key.partition(".")[0]


def changes_on_resume(commit: Commit, config: RunConfig, *, is_new_run: bool) -> dict[str, list[Any]]:
    """Return every difference that can show in the coming steps, as [then, now] by key; the gate has let them
    through."""
    return {
        difference.key: [difference.then, difference.now]
        for difference in differences(commit, config, is_new_run=is_new_run)
        if effect_of(difference, commit, config)[0] is not Effect.none
        or EFFECTS.get(difference.schema_key, _UNKNOWN)[0] in (Effect.phases, Effect.length)
    }


def differences(commit: Commit, config: RunConfig, *, is_new_run: bool) -> list[Difference]:
    """List what differs; only the model where nothing else is continued."""
    now = plain(config)
    if is_new_run or not commit.consumed_tokens or not commit.config:
        then_model: Mapping[str, Any] = {**now["model"], **model_of(commit)}
        return list(_differences({"model": then_model}, {"model": _without_cuts(now["model"])}, ""))
    then = {
        section: {**default, **commit.config.get(section, {})} for section, default in default_tree(RunConfig).items()
    }
    return [d for d in _differences(then, now, "") if not _is_cut_alone(d)]


def effect_of(difference: Difference, commit: Commit, config: RunConfig) -> tuple[Effect, str]:
    """Say what a difference does, with the reason; only `none`, `later` and `past` are left."""
    effect, reason = EFFECTS.get(difference.schema_key, _UNKNOWN)
    if effect is Effect.length:
        schedules = {config.lr.schedule.value, commit.config["lr"]["schedule"]}
        effect = Effect.none if schedules == {LrSchedule.constant.value} else Effect.later
    if effect is Effect.phases:
        match = _PHASE_NUMBER.match(difference.key)
        number = int(match[1]) if match else 0
        phases = [commit.config["data"]["phases"], plain(config)["data"]["phases"]]
        starts = [versions[number]["start_tokens"] for versions in phases if number < len(versions)]
        if min(starts) < commit.consumed_tokens:
            return Effect.past, f"{reason} that has begun"
        effect = Effect.none
    return effect, reason


def is_allowed(difference: Difference, config: RunConfig) -> bool:
    """Whether `checkpoint.allow_change` names the key, or what it is part of."""
    key = difference.schema_key
    return any(key == named or key.startswith((f"{named}.", f"{named}[")) for named in config.checkpoint.allow_change)


def _differences(then: Any, now: Any, key: str) -> Iterator[Difference]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in {**then, **now}:
            inner = f"{key}.{name}" if key else name
            yield from _differences(then.get(name, _ABSENT), now.get(name, _ABSENT), inner)
    elif isinstance(then, list) and isinstance(now, list) and any(isinstance(item, Mapping) for item in [*then, *now]):
        theirs, ours = _labelled(then), _labelled(now)
        for label in {**theirs, **ours}:
            inner, a, b = f"{key}[{label}]", theirs.get(label), ours.get(label)
            yield from _differences(a, b, inner) if a and b else [Difference(inner, a, b)]
    elif then != now:
        yield Difference(key, then, now)


def _labelled(items: list[Any]) -> dict[str, Any]:
    """Elements by their name where they have one, so that a new one in front does not make all others differ."""
    return {str(item.get("name", item.get("source", number))): item for number, item in enumerate(items)}


def _without_cuts(model: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, "layer_pattern": model["layer_pattern"].replace("|", "")}


def _is_cut_alone(difference: Difference) -> bool:
    if difference.key != "model.layer_pattern":
        return False
    return difference.then.replace("|", "") == difference.now.replace("|", "")


def _show(value: Any) -> str:
    return "nothing" if value is None else f'"{value}"' if isinstance(value, str) else str(value)
