"""The Mamba-2 mixer of a training run, with its heads and groups split over tensor-parallel ranks, and for convolution
and scan over context-parallel ranks as well.

Source: Mamba-2, arXiv 2405.21060; parameter names and packing as in Megatron-Core 0.16's `MambaMixer`.
`model/reference/mamba2_mixer.py` is the same mathematics in full, on one device. The arithmetic itself is in `ops/`.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.config.schema import ModelSection
from nemotron_train.engine.layer_parts import LayerParts
from nemotron_train.model.head_shares import HeadShares
from nemotron_train.model.names import part_rows
from nemotron_train.model.sharding import shard_packed, sharded_parameters
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.implementations import Operations
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes

# Shapes: S sequence (of a context-parallel rank: its part), B micro-batch, D hidden, H heads, I = H times head dim.
# Lower case: this rank's share.


class _Weights(nn.Module):
    """A named holder of parameters, where Megatron-Core's mixer has a submodule."""

    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class Mamba2Mixer(MegatronModule):
    def __init__(
        self,
        config: TransformerConfig,
        model: ModelSection,
        parts: LayerParts,
        operations: Operations,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.model, self.operations, self.tp_group = model, operations, groups.tp
        tp_size = groups.tp.size()
        self.sizes = sizes = MixerSizes(
            heads=model.mamba_num_heads // tp_size,
            head_dim=model.mamba_head_dim,
            groups=model.mamba_num_groups // tp_size,
            state=model.mamba_state_dim,
            conv_kernel=model.mamba_conv_kernel,
            chunk=model.mamba_chunk_size,
            epsilon=model.norm_epsilon,
        )
        self.shares = HeadShares(sizes, groups.cp) if groups.cp.size() > 1 else None
        linear: dict[str, Any] = dict(config=config, bias=False, is_expert=False, tp_group=groups.tp)
        self.in_proj = parts.norm_column_linear(
            model.hidden_size,
            sum(part_rows("zxBCd", model)),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **linear,
        )
        self.out_proj = parts.row_linear(
            model.mamba_num_heads * model.mamba_head_dim,
            model.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **linear,
        )

        def parameter(*shape: int, dtype: torch.dtype = config.params_dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()))

        self.conv1d = _Weights(
            weight=parameter(sizes.conv_channels, 1, sizes.conv_kernel), bias=parameter(sizes.conv_channels)
        )
        self.norm = _Weights(weight=parameter(sizes.inner))
        # Step sizes and decay rates act through exponentials: kept in float32 whatever the weights are.
        self.dt_bias = parameter(sizes.heads, dtype=torch.float32)
        self.A_log = parameter(sizes.heads, dtype=torch.float32)
        self.D = parameter(sizes.heads, dtype=torch.float32)

    def forward(self, hidden_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        zxBCdt_SBf, _ = self.in_proj(hidden_sBD)
        if self.config.recompute_granularity == "selective" and self.training:
            y_SBi = tensor_parallel.checkpoint(partial(self.mix, documents), False, zxBCdt_SBf)
        else:
            y_SBi = self.mix(documents, zxBCdt_SBf)
        out_sBD, _ = self.out_proj(y_SBi)
        return out_sBD

    def mix(self, documents: Documents | None, zxBCdt_SBf: Tensor) -> Tensor:
        """Convolution, scan and gated norm between the two projections: [S, B, f] -> [S, B, i]."""
        weights = CoreWeights(
            conv_CK=self.conv1d.weight.squeeze(1),
            conv_bias_C=self.conv1d.bias,
            dt_bias_H=self.dt_bias,
            A_H=-torch.exp(self.A_log),
            D_H=self.D,
            norm_I=self.norm.weight,
        )
        sizes, shares = self.sizes, self.shares
        if shares is None:
            return self.operations.mamba_core(zxBCdt_SBf, weights, sizes, documents)
        z_SBi, xBCdt_SBe = zxBCdt_SBf.split([sizes.inner, sizes.conv_channels + sizes.heads], dim=-1)
        y = self.operations.conv_scan(shares.take(xBCdt_SBe), shares.weights(weights), shares.sizes, documents)
        y_SBi = shares.give_back(y)
        return self.operations.gated_rms_norm(
            y_SBi, z_SBi, weights.norm_I, num_groups=sizes.groups, epsilon=sizes.epsilon
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint layout of Megatron-Core: packed rows are stored in parts, for any tensor-parallel size to read."""
        state = sharded_parameters(self, prefix, self.tp_group, metadata)
        for module, name in ((self.in_proj, "in_proj"), (self.out_proj, "out_proj")):
            state.update(module.sharded_state_dict(f"{prefix}{name}.", (), metadata))
        for name, parts in (("in_proj.weight", "zxBCd"), ("conv1d.weight", "xBC"), ("conv1d.bias", "xBC")):
            state[prefix + name] = shard_packed(
                state[prefix + name], parts, part_rows(parts, self.model, self.tp_group.size())
            )
        return state
