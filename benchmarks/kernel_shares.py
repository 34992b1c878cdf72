"""Where does the GPU time of some work go? Its kernels, grouped by what they do."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Kernels by what they do, the first match counts.
KERNEL_GROUPS = (
    ("communication", r"nccl"),
    ("quantisation", r"quant|cast|transpose.*fp8|fp8.*transpose|block_scaled"),
    ("FP8 products", r"nvjet_sm90_q|e4m3|e5m2|fp8.*gemm|sm90_fp8"),  # q: an operand of 8 bits
    (
        "Mamba scan",
        r"^(outputs|projection_gradients|carry_states|step_sizes|step_gradients)|_chunk_|_state_passing|ssd",
    ),
    ("Mamba convolution", r"causal_conv"),
    ("gated norm", r"gated_norm|_layer_norm_(fwd|bwd)"),
    ("attention", r"fmha|flash|sdpa"),
    ("embedding", r"^add_up_rows|embedding"),
    ("cross-entropy", r"softmax|cross_entropy|element_mul"),
    ("RMSNorm", r"rmsnorm|norm_(fwd|bwd)|layernorm|ln_"),
    ("bf16 products", r"gemm|nvjet|cutlass|cublas"),
    ("squared ReLU", r"srelu|relu|gated_act|act_kernel"),
    (
        "optimizer, gradient scaling and clearing",
        r"multi_tensor|adam|fill|Memset|vectorized_elementwise.*MulFunctor<float>",
    ),
    ("residual and other elementwise", r"elementwise|reduce|copy|Memcpy"),
)


@dataclass(frozen=True)
class KernelShares:
    group_ms: dict[str, float]  # longest first
    longest: list[tuple[str, int, float]]  # name, calls, milliseconds

    @property
    def total_ms(self) -> float:
        return sum(self.group_ms.values())


def kernel_shares(work: Callable[[], object]) -> KernelShares:
    """Run the work once more under torch's profiler; it should be warm."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        work()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in events if not e.key.startswith("Optimizer.")]  # a span over kernels that are listed too
    kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
    spent: dict[str, float] = {}
    for kernel in kernels:
        group = group_of(kernel.key)
        spent[group] = spent.get(group, 0.0) + kernel.self_device_time_total / 1e3
    return KernelShares(
        group_ms=dict(sorted(spent.items(), key=lambda item: -item[1])),
        longest=[(kernel.key, kernel.count, kernel.self_device_time_total / 1e3) for kernel in kernels[:60]],
    )


def group_of(kernel: str) -> str:
    return next((name for name, form in KERNEL_GROUPS if re.search(form, kernel, re.IGNORECASE)), "other")
