"""Do weights go between our model and Megatron-Core's own hybrid model by its checkpoints, and compute the same?"""

import queue
import tempfile
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.engine.groups import process_groups
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.trainer import build_runtime
from tests.engine.test_transformer_engine import MODEL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SEQ, SAMPLES = 512, 2


def megatron_core_model(config: RunConfig) -> Any:
    """Build Megatron-Core's hybrid model with its published layers: Transformer Engine's and mamba-ssm's."""
    from megatron.core.activations import squared_relu  # all of this wants Transformer Engine and mamba-ssm
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = config.model
    transformer_config = TransformerConfig(
        num_layers=len(model.layer_pattern), hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.num_query_groups,
        kv_channels=model.attention_head_dim, mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim, mamba_num_groups=model.mamba_num_groups,
        mamba_state_dim=model.mamba_state_dim, activation_func=squared_relu, gated_linear_unit=False,
        normalization="RMSNorm", layernorm_epsilon=model.norm_epsilon, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
    )  # fmt: skip
    return MambaModel(
        transformer_config, mamba_stack_spec, vocab_size=model.vocab_size, max_sequence_length=SEQ,
        hybrid_override_pattern=model.layer_pattern, position_embedding_type="none",
    ).cuda()  # fmt: skip


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int) -> None:
    """Move every weight, so that none of them is a 0 or 1 that two models have in common."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(noise.to(parameter.dtype), alpha=0.02)


def through_a_checkpoint(source: torch.nn.Module, target: torch.nn.Module, groups: Any) -> None:
    """Save one model with Megatron-Core and load the other from it."""

    def weights_of(model: Any) -> dict[str, Any]:
        state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        # Transformer Engine's FP8 state, empty in bf16, is none of the weights; our checkpoints leave it out.
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    filesystem_async._results_queue = queue.Queue()  # a save that nothing else runs beside needs no process for it
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(weights_of(source), folder)
        loaded = dist_checkpointing.load(weights_of(target), folder)
    missing, unexpected = torch.nn.Module.load_state_dict(target, loaded, strict=False)
    assert [key for key in missing if not key.endswith("_extra_state")] == []
    assert unexpected == []


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_weights_go_both_ways_and_losses_are_the_same() -> None:
    """Fails if a parameter has another name, shape, packing or meaning than in Megatron-Core's own hybrid model."""
    config = load_config([*MODEL, "precision=bf16", "train.micro_batch_size=2", f"train.seq_length={SEQ}"])
    me = launched_rank()
    plan, platform = plan_run(config, 1), choose_platform(me)

    with process_groups(plan.layout, platform, me, timeout_seconds=60, seed=1) as groups:
        ours, theirs = build_runtime(plan, platform, groups).chunks[0].module.eval(), megatron_core_model(config).eval()
        assert shapes_of(ours) == shapes_of(theirs)
        rows = torch.randint(config.model.vocab_size, (SAMPLES, SEQ + 1), generator=torch.Generator().manual_seed(3))
        tokens_BS, labels_BS = rows[:, :-1].contiguous().cuda(), rows[:, 1:].contiguous().cuda()
        positions_BS = torch.arange(SEQ, device="cuda").expand(SAMPLES, -1)

        @torch.no_grad()
        def losses() -> tuple[torch.Tensor, torch.Tensor]:
            of_theirs = theirs(tokens_BS, positions_BS, None, labels=labels_BS)
            return ours(tokens_BS, labels_BS).float(), of_theirs.float()

        for source, target, seed in ((ours, theirs, 1), (theirs, ours, 2)):
            shake(source, seed)
            apart_BS, before_BS = losses()
            assert (apart_BS - before_BS).std() > 0.2 * before_BS.std(), "two models to begin with"
            through_a_checkpoint(source, target, groups)
            for name, parameter in target.named_parameters():
                wanted = dict(source.named_parameters())[name].to(
                    parameter.dtype
                )  # dt_bias is bf16 there, float32 here
                assert torch.equal(parameter, wanted), name
            our_BS, their_BS = losses()
            # bf16 keeps 8 bits, and the two add up in another order.
            assert (our_BS - their_BS).norm() < 0.03 * (their_BS - their_BS.mean()).norm()
            assert float(our_BS.mean()) == pytest.approx(float(their_BS.mean()), rel=2e-3)
