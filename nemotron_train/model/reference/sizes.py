"""What sizes does the reference model have? Names and meaning are those of `config.schema.ModelSection`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReferenceSizes:
    layer_pattern: str  # one letter a layer: M Mamba-2, * attention, - MLP
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    attention_head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_num_groups: int
    mamba_state_dim: int
    mamba_conv_kernel: int = 4
    vocab_size: int
    tied_embeddings: bool = False
    norm: str = "rms"  # or layer
    norm_epsilon: float = 1e-5
    linear_bias: bool = False
    position_embedding: str = "none"  # or learned, or rope
    max_position_embeddings: int | None = None  # learned
    rope_base: float | None = None  # rope
    qkv_norm: str = "none"  # or qk, or qkv
    output_norm: bool = False
    attention_logit_scale: float = 1.0
    attention_logit_cap: float | None = None
    layer_scale: float | None = None

    @property
    def mamba_inner_size(self) -> int:
        """Channels of x, y and the gate z."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_size(self) -> int:
        """Channels the convolution sees: x, B and C."""
        return self.mamba_inner_size + 2 * self.mamba_num_groups * self.mamba_state_dim

    @property
    def mamba_projection_size(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.mamba_inner_size + self.mamba_conv_size + self.mamba_num_heads
