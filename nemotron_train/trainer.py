"""The run: builds the live objects once, takes steps until the tokens are used up, and decides who acts at which
step."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemotron_train.checkpoint.commit import Commit, DamagedCheckpoint
from nemotron_train.checkpoint.resume import (
    check_lengths_change_between_steps,
    check_may_resume,
    checkpoints_folder,
    choose_checkpoint,
    is_own,
    move_aside,
    progress_of,
)
from nemotron_train.checkpoint.retention import sweep
from nemotron_train.checkpoint.saver import Saver
from nemotron_train.checkpoint.store import load_checkpoint
from nemotron_train.config.load import write_resolved
from nemotron_train.config.schema import Recompute
from nemotron_train.data.batch import Batch
from nemotron_train.data.heldout import heldout_batches
from nemotron_train.data.ledger import ConsumptionLedger
from nemotron_train.data.loader import DataLoader
from nemotron_train.data.run_data import RunData
from nemotron_train.engine.agreement import any_rank_each, from_rank_zero
from nemotron_train.engine.captured_passes import CapturedPasses, graph_safe_generators
from nemotron_train.engine.groups import Groups
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import (
    build_ddp_config,
    build_optimizer_config,
    build_transformer_config,
    weight_dtype,
)
from nemotron_train.engine.optimizer import build_optimizer
from nemotron_train.engine.wrap import overwrite_gradients, wrap_in_data_parallel
from nemotron_train.errors import NumericsError
from nemotron_train.evaluate import evaluate
from nemotron_train.loss import MeanLoss
from nemotron_train.model.build import build_model_chunks
from nemotron_train.observe.jsonl_writer import read_records
from nemotron_train.observe.plot import draw_loss
from nemotron_train.observe.throughput import StepSpeed, StepTimer
from nemotron_train.observe.writers import Writers, build_writers
from nemotron_train.ops.implementations import best_operations
from nemotron_train.optim.parameter_groups import VECTOR_GROUPS
from nemotron_train.plan.ranges import SKIPPED_STEPS_KEPT
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.platform.device import Platform
from nemotron_train.platform.signals import StopRequest
from nemotron_train.runtime import Progress, Runtime
from nemotron_train.step import StepResult, train_step

logger = logging.getLogger(__name__)


def build_runtime(plan: RunPlan, platform: Platform, groups: Groups) -> Runtime:
    """Build model, data-parallel wrapping and optimizer for this rank."""
    config = plan.config
    ops, parts = best_operations(platform.device, weight_dtype(config)), choose_layer_parts(plan, platform)
    logger.info("Layers: %s. Operations: %s.", parts.name, ops.name)
    captured = None
    if config.train.cuda_graphs:
        captured = CapturedPasses(graph_safe_generators(config.run.seed), in_pipeline=plan.layout.pipeline > 1)
    transformer_config = build_transformer_config(plan, ops, parts)
    chunks = build_model_chunks(plan, transformer_config, parts, ops, groups)
    wrapped = wrap_in_data_parallel(chunks, transformer_config, build_ddp_config(config), groups)
    if parts.fuses_weight_gradients and config.train.recompute is not Recompute.full:
        overwrite_gradients(wrapped)
    optimizer = build_optimizer(build_optimizer_config(config), wrapped, VECTOR_GROUPS)
    return Runtime(plan=plan, platform=platform, groups=groups, chunks=wrapped, optimizer=optimizer, captured=captured)


class Trainer:
    """Takes a run from its newest checkpoint, or from nothing, to its end or to a stop signal."""

    def __init__(self, run: Runtime, data: RunData, stop: StopRequest, *, is_reporter: bool) -> None:
        """Args:
        is_reporter: this rank writes metrics, pictures and messages; one rank of the run does.
        """
        self.run, self.data, self.stop, self.is_reporter = run, data, stop, is_reporter
        self.config, self.batch_plan = run.plan.config, run.plan.batches
        self.ledger = ConsumptionLedger(Path(self.config.run.dir), data.blend) if is_reporter else None

    def train(self) -> bool:
        """Train to the end.

        Returns:
            True when all steps are taken, False when a signal stopped the run after a checkpoint.

        Raises:
            CheckpointError, DataError, NumericsError: the run cannot go on.
        """
        progress = self.resume()
        if not self.batch_plan.steps_left(progress.consumed_tokens):
            logger.info("Nothing left to train: %s of train.train_tokens=%s tokens are consumed.", *(
                f"{tokens:,}" for tokens in (progress.consumed_tokens, self.config.train.train_tokens)
            ))  # fmt: skip
        writers = self.open_writers(progress)
        if self.ledger is not None:
            self.ledger.begin(progress.step, self.data.reader.sources)
        try:
            with DataLoader(
                self.data.reader,
                self.run.share,
                self.batch_plan.global_batch_size_at,
                progress.consumed_tokens,
                self.data.eod_id,
            ) as loader:
                finished = self.take_steps(progress, loader, writers)
        finally:
            writers.close()
        self.run.close()
        return finished

    def resume(self) -> Progress:
        """Load the checkpoint that `checkpoint.resume` names; without one, start from nothing. A damaged one of the
        run's own is moved aside, and the one before it loaded."""
        from_rank_zero(lambda: sweep(checkpoints_folder(self.config)))
        while (folder := from_rank_zero(lambda: choose_checkpoint(self.config))) is not None:
            try:
                return self.go_on_from(folder)
            except DamagedCheckpoint as damage:
                if not is_own(folder, self.config):
                    raise
                from_rank_zero(partial(move_aside, folder, damage))
        return Progress()

    def go_on_from(self, folder: Path) -> Progress:
        is_new_run = not is_own(folder, self.config)

        def check(commit: Commit) -> None:
            check_may_resume(commit, self.config, self.data.blend, is_new_run=is_new_run)

        commit = load_checkpoint(self.run, folder, check)
        check_lengths_change_between_steps(self.batch_plan, commit.consumed_tokens)
        logger.info("Going on from %s: step %d, %s tokens.", folder, commit.step, f"{commit.consumed_tokens:,}")
        return progress_of(commit, folder, self.config)

    def open_writers(self, progress: Progress) -> Writers:
        if not self.is_reporter:
            return Writers([])
        write_resolved(self.config, Path(self.config.run.dir) / "resolved.yaml")
        return build_writers(self.config, num_steps=self.last_step(progress), resume_step=progress.step)

    def last_step(self, progress: Progress) -> int:
        return progress.step + self.batch_plan.steps_left(progress.consumed_tokens)

    def take_steps(self, progress: Progress, loader: DataLoader, writers: Writers) -> bool:
        train, last_step = self.config.train, self.last_step(progress)
        timer = StepTimer(
            num_ranks=self.run.plan.layout.world_size,
            train_tokens=train.train_tokens,
        )
        saver = Saver(self.run, self.data.blend, writers.event)
        while progress.step < last_step:
            timer.start()
            micro_batches = [
                next(loader) for _ in range(self.batch_plan.num_micro_batches_at(progress.consumed_tokens))
            ]
            result = train_step(self.run, micro_batches, progress.consumed_tokens)
            step_tokens = self.batch_plan.tokens_per_step_at(progress.consumed_tokens)
            before, progress = progress, advance(progress, step_tokens, result)
            self.check_skips(result, progress)
            self.run.platform.synchronize()
            speed = timer.finish(
                step_tokens=step_tokens,
                consumed_tokens=progress.consumed_tokens,
                flops_per_token=self.run.plan.flops_per_token_at(before.consumed_tokens),
            )

            stopped, is_writing, retry = any_rank_each(
                (self.stop.signal_name is not None, *saver.signals()), self.run.platform.device
            )
            at_end = progress.step == last_step
            if self.ledger is not None:  # every step, whatever is logged
                with outliving_the_disk(f"account for step {progress.step}"):
                    self.ledger.write(progress.step, before.consumed_tokens, progress.consumed_tokens)
            if progress.step % self.config.log.every_steps == 0 or at_end or stopped:
                with outliving_the_disk(f"log step {progress.step}"):
                    writers.write(self.step_record(before, progress, result, speed))
            if at_end or stopped:
                saver.save_last(progress)
            else:
                due = retry or is_due(self.config.checkpoint.every_steps, progress.step)
                saver.after_step(progress, is_busy=is_writing, is_due=due)
            if (is_due(train.eval_every_steps, progress.step) and not stopped) or at_end:
                self.evaluate_and_draw(progress, writers)
            if stopped and not at_end:
                writers.event(
                    f"Stopped by {self.stop.signal_name or 'a signal to another rank'}; the same command goes on from "
                    f"step {progress.step}."
                )
                return False
        return True

    def evaluate_and_draw(self, progress: Progress, writers: Writers) -> None:
        """Measure the held-out loss, if there are held-out shards, and redraw the run's picture."""
        if self.data.has_heldout:
            train = self.config.train
            batches: Sequence[Batch] = list(
                heldout_batches(
                    self.data.heldout, train.eval_tokens, train.seq_length, self.run.share, self.data.eod_id
                )
            )
            began = time.perf_counter()
            losses = self.loss_record("eval_loss", evaluate(self.run, batches))
            seconds = time.perf_counter() - began
            counts = {"step": progress.step, "consumed_tokens": progress.consumed_tokens, "eval_seconds": seconds}
            with outliving_the_disk(f"log the held-out loss of step {progress.step}"):
                writers.write({**counts, **losses})
        if self.is_reporter:
            folder = Path(self.config.run.dir)
            with outliving_the_disk(f"draw {folder / 'loss.png'}"):
                records = read_records(folder / "metrics.jsonl")
                draw_loss(records, self.config.data.phases, folder / "loss.png", self.config.run.name)

    def check_skips(self, result: StepResult, progress: Progress) -> None:
        """Raise NumericsError when more than `max_skipped_steps` steps in a row were skipped."""
        skipped_in_a_row, limit = progress.skipped_in_a_row, self.config.train.max_skipped_steps
        if skipped_in_a_row > limit:
            raise NumericsError(
                f"The gradients of {skipped_in_a_row} steps in a row, up to step {progress.step}, were not finite "
                f"(train.max_skipped_steps={limit}). The weights are those of step "
                f"{progress.step - skipped_in_a_row}; lower lr.peak, or look at the data."
            )

    def step_record(
        self, before: Progress, progress: Progress, result: StepResult, speed: StepSpeed
    ) -> dict[str, int | float | None]:
        starts = [phase.start_tokens for phase in self.config.data.phases]
        return {
            "step": progress.step,
            "consumed_tokens": progress.consumed_tokens,
            "phase": sum(start <= before.consumed_tokens for start in starts) - 1,
            "seq_length": self.batch_plan.seq_length_at(before.consumed_tokens),
            "global_batch_size": self.batch_plan.global_batch_size_at(before.consumed_tokens),
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "skipped_steps": progress.skipped_steps,
            **self.loss_record("loss", result.loss),
            **speed.as_record(),
        }

    def loss_record(self, name: str, mean: MeanLoss) -> dict[str, float]:
        sources = zip(self.config.data.sources, mean.by_source, strict=True)
        return {name: mean.loss, **{f"{name}/{source.name}": loss for source, loss in sources if loss == loss}}


@contextmanager
def outliving_the_disk(what: str) -> Iterator[None]:
    """Say what could not be written and go on: a disk that is full or gone for a while is no reason to stop training.

    Checkpoints are the `Saver`'s, which tries again.
    """
    try:
        yield
    except OSError as error:
        logger.error("Cannot %s: %s", what, error)


def advance(progress: Progress, step_tokens: int, result: StepResult) -> Progress:
    """Count a step; a skipped one consumes its tokens too."""
    skipped_at = (*progress.skipped_at, progress.step + 1)
    return replace(
        progress,
        step=progress.step + 1,
        consumed_tokens=progress.consumed_tokens + step_tokens,
        skipped_steps=progress.skipped_steps + (not result.updated),
        skipped_at=progress.skipped_at if result.updated else skipped_at[-SKIPPED_STEPS_KEPT:],
    )


def is_due(every_steps: int, step: int) -> bool:
    """Whether something that happens every so many steps (0 = never) happens after this one."""
    return every_steps > 0 and step % every_steps == 0
