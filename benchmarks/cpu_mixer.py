"""How fast is the Mamba-2 mixer on one CPU thread beside the plain path of transformers' NemotronH?

    python -m benchmarks.cpu_mixer

Both mixers have the same weights and inputs; gradients are compared before anything is timed. What is timed is the
processor time of this process, the repeats of all candidates are interleaved, and the fastest of each counts, so that a
busy machine slows all alike. Read the ratios of one run; absolute numbers differ from machine to machine.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from nemotron_train.ops.causal_conv import causal_conv_silu
from nemotron_train.ops.gated_norm import gated_rms_norm
from nemotron_train.ops.ssd import ssd

OURS_CHUNKS = (16, 32, 64, 128)
THEIR_CHUNKS = (32, 64, 128)
REPEATS = 7


@dataclass(frozen=True)
class Case:
    hidden_size: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    micro_batch: int
    seq_length: int

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden_size}, {self.heads} heads x {self.head_dim}, {self.groups} groups, "
            f"state {self.state_dim}, {self.micro_batch} x {self.seq_length} tokens"
        )


CASES = (
    Case(hidden_size=128, heads=8, head_dim=32, groups=2, state_dim=16, micro_batch=8, seq_length=256),
    Case(hidden_size=256, heads=16, head_dim=32, groups=4, state_dim=32, micro_batch=8, seq_length=512),
    Case(hidden_size=256, heads=16, head_dim=32, groups=2, state_dim=64, micro_batch=4, seq_length=1024),
)


def build_mixer(case: Case, chunk_size: int) -> NemotronHMamba2Mixer:
    """Build transformers' mixer with the step sizes of a fresh model (about 0.05)."""
    config = NemotronHConfig(
        hidden_size=case.hidden_size,
        layers_block_type=["linear_attention"],
        mamba_num_heads=case.heads,
        mamba_head_dim=case.head_dim,
        n_groups=case.groups,
        ssm_state_size=case.state_dim,
        chunk_size=chunk_size,
        time_step_min=1e-30,  # do not clamp dt
    )
    torch.manual_seed(0)
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    torch.nn.init.constant_(mixer.dt_bias, -3.0)
    return mixer


def our_mixer(mixer: NemotronHMamba2Mixer, x: Tensor, chunk_size: int) -> Tensor:
    """Run our operations with the weights of transformers' mixer."""
    heads, groups, inner = mixer.num_heads, mixer.n_groups, mixer.intermediate_size
    z, xBC, dt = mixer.in_proj(x).split([inner, mixer.conv_dim, heads], dim=-1)
    xBC = causal_conv_silu(xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    x, B, C = xBC.split([inner, *[groups * mixer.ssm_state_size] * 2], dim=-1)
    y = ssd(
        x.unflatten(-1, (heads, -1)),
        functional.softplus(dt + mixer.dt_bias),
        -mixer.A_log.exp(),
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        mixer.D,
        chunk_size=chunk_size,
    )
    epsilon = mixer.norm.variance_epsilon
    return mixer.out_proj(gated_rms_norm(y.flatten(2), z, mixer.norm.weight, num_groups=groups, epsilon=epsilon))


def fastest_seconds(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the shortest processor time of each, the repeats interleaved."""
    fastest = dict.fromkeys(candidates, float("inf"))
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            fastest[name] = min(fastest[name], time.process_time() - start)
    return fastest


def measure(case: Case) -> dict[str, float]:
    """Return seconds of one forward and backward, by candidate."""
    x = torch.randn(case.micro_batch, case.seq_length, case.hidden_size, requires_grad=True)
    cotangent = torch.randn_like(x)
    mixers = {chunk: build_mixer(case, chunk) for chunk in THEIR_CHUNKS}
    first = mixers[THEIR_CHUNKS[0]]

    def gradients(output: Tensor, mixer: NemotronHMamba2Mixer) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, (x, *mixer.parameters()), cotangent)

    for mine, other in zip(gradients(our_mixer(first, x, 32), first), gradients(first(x), first), strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm(), "the two mixers do not compute the same"

    def projections_only() -> None:
        projected = first.in_proj(x)
        first.out_proj(projected[..., : first.intermediate_size]).backward(cotangent)

    def ours(chunk: int) -> object:
        return gradients(our_mixer(first, x, chunk), first)

    def theirs(mixer: NemotronHMamba2Mixer) -> object:
        return gradients(mixer(x), mixer)

    candidates: dict[str, Callable[[], object]] = {"projections alone": projections_only}
    candidates |= {f"ours, chunk {chunk}": partial(ours, chunk) for chunk in OURS_CHUNKS}
    candidates |= {f"transformers, chunk {chunk}": partial(theirs, mixer) for chunk, mixer in mixers.items()}
    return fastest_seconds(candidates, REPEATS)


def main() -> None:
    torch.set_num_threads(1)
    console = Console()
    console.print(
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, 1 thread, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, float32; fastest of {REPEATS} interleaved repeats"
    )
    table = Table(
        "mixer, forward + backward", "tokens/s", "of transformers' best", title="Mamba-2 mixer on one CPU thread"
    )
    for case in track(CASES, description="measuring", console=console, transient=True):
        seconds = measure(case)
        best = min(value for name, value in seconds.items() if name.startswith("transformers"))
        table.add_section()
        table.add_row(f"[bold]{case}", "", "")
        for name, value in seconds.items():
            table.add_row(f"  {name}", f"{case.micro_batch * case.seq_length / value:,.0f}", f"{best / value:.2f} x")
    console.print(table)


if __name__ == "__main__":
    main()
