"""What cannot work in a run: the rules of batches, learning rate, data and checkpoints. See `rules.py`."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from nemotron_train.config.keys import describe_keys, near_miss
from nemotron_train.config.schema import DocumentBoundary, LrSchedule, Recompute, RunConfig
from nemotron_train.plan.batching import first_sample_length, plan_batches
from nemotron_train.plan.layout import ranks_per_replica
from nemotron_train.plan.nearest import nearest_doublings, nearest_multiples

SCHEDULES_THAT_READ = {
    "min": (LrSchedule.wsd, LrSchedule.cosine),
    "decay_tokens": (LrSchedule.wsd,),
    "decay_shape": (LrSchedule.wsd,),
}


def batches_divide_among_ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    train, pp_size = config.train, config.parallel.pipeline_parallel_size
    ranks = ranks_per_replica(config.parallel)
    if world_size % ranks:
        return  # reported by another rule
    data_size = world_size // ranks
    samples = train.micro_batch_size * data_size
    for key, batch in _batch_sizes(config):
        if batch % samples:
            yield (
                f"{key}={batch} is not a multiple of {samples} (train.micro_batch_size={train.micro_batch_size} x "
                f"{data_size} data-parallel ranks). Use {nearest_multiples(batch, samples)}, or change "
                "train.micro_batch_size or the number of ranks."
            )
        elif config.parallel.virtual_pipeline_size > 1 and batch // samples % pp_size:
            yield (
                f"{key}={batch} gives {batch // samples} micro-batches a rank, not a multiple of "
                f"parallel.pipeline_parallel_size={pp_size}, which the interleaved schedule "
                f"(parallel.virtual_pipeline_size={config.parallel.virtual_pipeline_size}) needs. "
                f"Use {nearest_multiples(batch, samples * pp_size)}."
            )


def batch_schedule_rises(config: RunConfig, world_size: int) -> Iterator[str]:
    starts = [0, *(change.start_tokens for change in config.train.batch_schedule)]
    for index, (before, start) in enumerate(pairwise(starts)):
        if start <= before:
            previous = f"train.batch_schedule[{index - 1}].start_tokens" if index else "the start of the run"
            yield (
                f"train.batch_schedule[{index}].start_tokens={start} must be after {previous} ({before}). "
                "The batch size of the start is train.global_batch_size."
            )


def train_tokens_hold_a_step(config: RunConfig, world_size: int) -> Iterator[str]:
    train, (key, seq_length) = config.train, first_sample_length(config)
    tokens_per_step = train.global_batch_size * seq_length
    if train.train_tokens < tokens_per_step:
        yield (
            f"train.train_tokens={train.train_tokens} is less than one step of {tokens_per_step} tokens "
            f"(train.global_batch_size={train.global_batch_size} x {key}={seq_length}). "
            "Train longer, or make the step smaller."
        )


def evaluation_has_something_to_read(config: RunConfig, world_size: int) -> Iterator[str]:
    train = config.train
    if train.eval_every_steps and not any(source.eval_prefixes for source in config.data.sources):
        yield (
            f"train.eval_every_steps={train.eval_every_steps}, but no source has held-out shards. "
            "Set data.sources[].eval_prefixes, or train.eval_every_steps=0."
        )
    if train.eval_tokens < train.seq_length:
        yield (f"train.eval_tokens={train.eval_tokens} is less than one sample of train.seq_length={train.seq_length}.")


def graphs_repeat_every_step(config: RunConfig, world_size: int) -> Iterator[str]:
    # A graph repeats the same kernels on the same memory, and waits for nothing that began outside it.
    if not config.train.cuda_graphs:
        return
    if config.data.document_boundary is DocumentBoundary.reset:
        yield (
            "train.cuda_graphs=true is not possible with data.document_boundary=reset: every sample has other "
            "documents, and other kernels for them. Set the first to false, or the second to none."
        )
    if config.train.recompute is Recompute.full:
        yield (
            "train.cuda_graphs=true is not possible with train.recompute=full: the state of random generators is read "
            "there, which waits for the GPU. Set the first to false, or the second to selective."
        )
    if config.parallel.context_parallel_size > 1:
        yield (
            "train.cuda_graphs=true is not possible with parallel.context_parallel_size="
            f"{config.parallel.context_parallel_size}: the exchanges of attention waited for ever when it was tried. "
            "Set the first to false, or the second to 1."
        )
    if config.parallel.overlap_param_gather:
        yield (
            "train.cuda_graphs=true is not possible with parallel.overlap_param_gather=true: gathers that the "
            "optimizer starts would end inside the graph. Set one of them to false."
        )


def schedule_has_its_keys_and_no_others(config: RunConfig, world_size: int) -> Iterator[str]:
    lr = config.lr
    for name, schedules in SCHEDULES_THAT_READ.items():
        value = getattr(lr, name)
        if lr.schedule in schedules and value is None:
            others = " or ".join(f"lr={schedule.value}" for schedule in LrSchedule if schedule not in schedules)
            yield (
                f"lr.{name} is null, but lr.schedule={lr.schedule.value} needs it. "
                f"Set it, or choose another group: {others}."
            )
        if lr.schedule not in schedules and value is not None:
            users = " or ".join(f"lr={schedule.value}" for schedule in schedules)
            yield (
                f"lr.{name}={getattr(value, 'value', value)} has no effect with lr.schedule={lr.schedule.value}. "
                f"Set lr.{name}=null, or choose another group: {users}."
            )


def rate_falls_from_peak_to_min(config: RunConfig, world_size: int) -> Iterator[str]:
    lr = config.lr
    if lr.min is not None and lr.min > lr.peak:
        yield f"lr.min={lr.min} is above lr.peak={lr.peak}. Lower lr.min or raise lr.peak."


def warmup_and_decay_fit_into_the_run(config: RunConfig, world_size: int) -> Iterator[str]:
    lr, train_tokens = config.lr, config.train.train_tokens
    if lr.schedule is LrSchedule.wsd and lr.decay_tokens is not None:
        if lr.warmup_tokens + lr.decay_tokens > train_tokens:
            yield (
                f"lr.warmup_tokens={lr.warmup_tokens} and lr.decay_tokens={lr.decay_tokens} do not fit into "
                f"train.train_tokens={train_tokens}. Shorten them, or train longer."
            )
    elif lr.warmup_tokens >= train_tokens:
        yield (
            f"lr.warmup_tokens={lr.warmup_tokens} must be less than train.train_tokens={train_tokens}. "
            "Shorten the warm-up, or train longer."
        )


def source_names_are_unique(config: RunConfig, world_size: int) -> Iterator[str]:
    if not config.data.sources:
        yield "data.sources is empty: there is nothing to train on. Choose a group with data=NAME, or list sources."
    for name, count in Counter(source.name for source in config.data.sources).items():
        if count > 1:
            yield f"data.sources has {count} sources named {name!r}. Give each its own name."


def phases_start_at_zero_and_rise(config: RunConfig, world_size: int) -> Iterator[str]:
    starts = [phase.start_tokens for phase in config.data.phases]
    if not starts:
        yield "data.phases is empty: no source has a weight. List one phase with start_tokens 0."
    elif starts[0] != 0:
        yield f"data.phases[0].start_tokens={starts[0]}: the first phase starts at 0."
    for index in range(1, len(starts)):
        if starts[index] <= starts[index - 1]:
            yield (
                f"data.phases[{index}].start_tokens={starts[index]} must be above "
                f"data.phases[{index - 1}].start_tokens={starts[index - 1]}."
            )


def lengths_change_between_steps(config: RunConfig, world_size: int) -> Iterator[str]:
    phases, train = config.data.phases, config.train
    starts = [0, *(phase.start_tokens for phase in phases[1:])]
    if not phases or any(after <= before for before, after in pairwise(starts)):
        return  # reported by another rule
    batches = plan_batches(train, phases, 1)
    lengths = [phase.seq_length or train.seq_length for phase in phases]
    for index, (before, after) in enumerate(pairwise(lengths), start=1):
        start = starts[index]
        step = batches.step_at_or_after(start)
        if before == after or step == start:
            continue
        earlier = step - batches.tokens_per_step_at(start - 1)
        yield (
            f"data.phases[{index}].start_tokens={start} is within a step, and samples of {before} and {after} tokens "
            f"cannot share one. Steps start at {earlier} and {step} tokens."
        )


def lengths_are_doublings_of_the_first(config: RunConfig, world_size: int) -> Iterator[str]:
    first_key, first = first_sample_length(config)
    for index, phase in enumerate(config.data.phases):
        length = phase.seq_length or config.train.seq_length
        ratio, rest = divmod(max(length, first), min(length, first))
        if rest or ratio & (ratio - 1):
            key = f"data.phases[{index}].seq_length" if phase.seq_length else "train.seq_length"
            yield (
                f"{key}={length} is not {first_key}={first} times a power of two; a source could not "
                f"read on in phase {index} from where it was. Use {nearest_doublings(length, first)}."
            )


def fill_in_the_middle_has_its_tokens(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    wanted = any(weight.fim_rate for phase in data.phases for weight in phase.weights)
    if wanted and len(set(data.fim_tokens)) != 3:
        yield (
            "data.phases[].weights[].fim_rate is above 0, which takes three tokens; "
            f"data.fim_tokens={data.fim_tokens}. Name the tokenizer's tokens before prefix, suffix and middle, or set "
            "fim_rate to 0."
        )
    if not wanted and data.fim_tokens:
        yield f"data.fim_tokens={data.fim_tokens} has no effect while every fim_rate is 0. Set it to []."


def phases_weigh_known_sources_once(config: RunConfig, world_size: int) -> Iterator[str]:
    sources = {source.name: source for source in config.data.sources}
    for index, phase in enumerate(config.data.phases):
        key = f"data.phases[{index}].weights"
        for name, count in Counter(weight.source for weight in phase.weights).items():
            if count > 1:
                yield f"{key} gives {name!r} {count} weights. Give it one."
            if name not in sources:
                yield f"{key} weighs {name!r}, which is not in data.sources ({', '.join(sources)})." + near_miss(
                    name, sources
                )
        drawn = [weight.source for weight in phase.weights if weight.weight > 0]
        if not drawn:
            yield f"{key}: every weight is 0. Give one source a weight above 0."
        for name in drawn:
            if name in sources and not sources[name].prefixes:
                yield f"{key} draws from {name!r}, which has no prefixes in data.sources. List some, or set weight 0."


def every_source_is_used(config: RunConfig, world_size: int) -> Iterator[str]:
    weighed = {weight.source for phase in config.data.phases for weight in phase.weights}
    for source in config.data.sources:
        if source.prefixes and source.name not in weighed:
            yield (
                f"data.sources has {source.name!r}, which no phase weighs. Add it to data.phases[].weights "
                "(weight 0 leaves it out on purpose), or empty its prefixes."
            )
        if not source.prefixes and not source.eval_prefixes:
            yield f"data.sources has {source.name!r} with neither prefixes nor eval_prefixes. List its shards."


def resume_is_a_word_or_a_folder(config: RunConfig, world_size: int) -> Iterator[str]:
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and "/" not in resume:
        yield (
            f'checkpoint.resume="{resume}" is not auto, never, or a checkpoint folder.'
            f"{near_miss(resume, ['auto', 'never'])} A folder in the current one is written ./NAME."
        )


def old_checkpoints_are_kept_apart(config: RunConfig, world_size: int) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.keep_every_tokens and not checkpoint.keep_last:
        yield (
            f"checkpoint.keep_every_tokens={checkpoint.keep_every_tokens} has no effect with checkpoint.keep_last=0, "
            "which keeps all checkpoints. Say how many of the newest are to stay, or set it to 0."
        )


def saves_beside_training_are_periodic(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.checkpoint.asynchronous and not config.checkpoint.every_steps:
        yield (
            "checkpoint.asynchronous=true has no effect with checkpoint.every_steps=0: a run waits for its last "
            "save. Set checkpoint.every_steps, or checkpoint.asynchronous=false."
        )


def allowed_changes_are_keys(config: RunConfig, world_size: int) -> Iterator[str]:
    if not config.checkpoint.allow_change:
        return  # a search of layouts asks hundreds of times, and listing the keys is slow
    known = [info.key for info in describe_keys()]
    for named in config.checkpoint.allow_change:
        if named and not any(key == named or key.startswith((f"{named}.", f"{named}[")) for key in known):
            yield f"checkpoint.allow_change names {named}, which is not a key or section.{near_miss(named, known)}"
        if not named:
            yield "checkpoint.allow_change names an empty key. Take it out."


def names_are_not_empty(config: RunConfig, world_size: int) -> Iterator[str]:
    for key, value in (
        ("run.name", config.run.name),
        ("run.dir", config.run.dir),
        ("data.path", config.data.path),
        ("data.tokenizer", config.data.tokenizer),
        ("data.eod_token", config.data.eod_token),
        ("log.wandb_project", config.log.wandb_project),
    ):
        if not value.strip():
            yield f'{key}="{value}" is empty. Give it a value.'


def _batch_sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    yield "train.global_batch_size", config.train.global_batch_size
    for index, change in enumerate(config.train.batch_schedule):
        yield f"train.batch_schedule[{index}].global_batch_size", change.global_batch_size


RUN_RULES = (
    batches_divide_among_ranks,
    batch_schedule_rises,
    train_tokens_hold_a_step,
    evaluation_has_something_to_read,
    graphs_repeat_every_step,
    schedule_has_its_keys_and_no_others,
    rate_falls_from_peak_to_min,
    warmup_and_decay_fit_into_the_run,
    source_names_are_unique,
    phases_start_at_zero_and_rise,
    lengths_change_between_steps,
    lengths_are_doublings_of_the_first,
    fill_in_the_middle_has_its_tokens,
    phases_weigh_known_sources_once,
    every_source_is_used,
    resume_is_a_word_or_a_folder,
    old_checkpoints_are_kept_apart,
    saves_beside_training_are_periodic,
    allowed_changes_are_keys,
    names_are_not_empty,
)
