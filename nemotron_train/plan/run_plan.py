"""What follows from the configuration and the number of ranks: one frozen RunPlan, read by everything that runs.

Nothing here touches a device, a process group or a file.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import RunConfig
from nemotron_train.plan.batching import BatchPlan, plan_batches
from nemotron_train.plan.layer_times import stage_costs
from nemotron_train.plan.layout import Layout, plan_layout
from nemotron_train.plan.lr_curve import learning_rate
from nemotron_train.plan.pattern import LayerKind, ParsedPattern, parse_pattern
from nemotron_train.plan.pipeline_cut import cut_pipeline, rank_costs
from nemotron_train.plan.precision_map import Gemm, fp8_layers, list_gemms
from nemotron_train.plan.rules import check_rules
from nemotron_train.plan.sizes import ModelSizes, count_model


@dataclass(frozen=True)
class RunPlan:
    """Every number that the run needs and the user did not state. Built by `plan_run`, which has checked all rules."""

    config: RunConfig
    layout: Layout
    pattern: ParsedPattern
    chunks: tuple[range, ...]  # global layer indices of every model chunk, in pipeline order
    batches: BatchPlan
    sizes: ModelSizes  # FLOPs of a token as in the first step

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        return self.pattern.layers

    @property
    def fp8_layers(self) -> range:
        """Return the numbers of the layers whose linear layers run in FP8."""
        return fp8_layers(self.config.precision, len(self.layers))

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        """Return all linear layers, from input to output, with their precision."""
        return list_gemms(self.config, self.pattern)

    @property
    def num_steps(self) -> int:
        return self.batches.num_steps

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of the first step; `batches` knows those of later ones."""
        return self.batches.tokens_per_step_at(0)

    @property
    def train_flops(self) -> int:
        """Return the model FLOPs of the whole run."""
        return sum(tokens * self._flops_per_token(length) for length, tokens in self.batches.tokens_by_length().items())

    def flops_per_token_at(self, consumed_tokens: int) -> int:
        """Return the model FLOPs of a token in the step after `consumed_tokens`; attention's go by sample length."""
        return self._flops_per_token(self.batches.seq_length_at(consumed_tokens))

    def chunks_of(self, pp_rank: int) -> tuple[range, ...]:
        """Return the layers of a pipeline rank's model chunks, by virtual stage."""
        return self.chunks[pp_rank :: self.layout.pipeline]

    def _flops_per_token(self, seq_length: int) -> int:
        return count_model(self.config.model, self.pattern, seq_length).flops_per_token

    def learning_rate_at(self, consumed_tokens: int) -> float:
        """Return the rate of the step that starts after `consumed_tokens`."""
        return learning_rate(self.config.lr, self.config.train.train_tokens, consumed_tokens)

    def pipeline_costs(self) -> list[float]:
        """Return the seconds of one micro-batch, forward and backward, on every pipeline rank (of H200s), of samples as
        long as the cut is made for."""
        costs = stage_costs(self.config, self.pattern, self.batches.main_seq_length)
        return rank_costs(self.chunks, costs, self.layout.pipeline)


def plan_run(config: RunConfig, world_size: int) -> RunPlan:
    """Derive the plan of a run on `world_size` ranks.

    Raises:
        ConfigError: the combination is impossible; lists every rule that is violated.
    """
    check_rules(config, world_size)
    layout = plan_layout(config.parallel, world_size)
    pattern = parse_pattern(config.model.layer_pattern)
    batches = plan_batches(config.train, config.data.phases, layout.data)
    costs = stage_costs(config, pattern, batches.main_seq_length)
    # Virtual stages are cut for the segment with most micro-batches: batches grow, so most steps are its.
    micro_batches = max(batches.num_micro_batches_at(segment.start_tokens) for segment in batches.segments)
    return RunPlan(
        config=config,
        layout=layout,
        pattern=pattern,
        chunks=cut_pipeline(pattern, costs, layout.pipeline, layout.virtual_pipeline, micro_batches),
        batches=batches,
        sizes=count_model(config.model, pattern, batches.seq_length_at(0)),
    )
