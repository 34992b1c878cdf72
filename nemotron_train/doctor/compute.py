"""Does this device compute right, and as fast as it should? A matrix product, and the state-space scan."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_train.doctor.findings import Finding, Status
from nemotron_train.model.reference.ssd import ssd_recurrence
from nemotron_train.ops.implementations import best_operations
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes, mamba_core
from nemotron_train.ops.ssd import ssd

# Dense bf16 TFLOP/s of the data sheets, by what stands in the device's name; the first that fits counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}
# A large product reaches about 0.6 to 0.8 of the peak. Below these a GPU is throttled, shared or broken (our choice).
MIN_SHARE_OF_PEAK, MIN_SHARE_OF_MEDIAN = 0.45, 0.85
# Largest norm of the difference to the exact result, in shares of its norm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


def check_gemms(
    devices: Sequence[torch.device], matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> list[Finding]:
    """Return a finding for each device; one that is slower than the others is slow too."""
    findings, measured = [], {}
    for device in devices:
        try:
            measured[device] = _measure_gemm(device, matmul)
        except RuntimeError as error:  # of CUDA: no memory left, an illegal access, a GPU that fell off the bus
            fix = "See nvidia-smi for other processes and dmesg (Xid) for errors of the device."
            found = f"fails: {(str(error).splitlines() or [''])[0]}"
            findings.append(Finding(f"matrix product on {device}", Status.wrong, found, fix))
    for device, (tflops, wrong_rows) in measured.items():
        median = statistics.median(others for others, _ in measured.values())
        findings.append(_gemm_finding(device, tflops, wrong_rows, median))
    return findings


def _measure_gemm(device: torch.device, matmul: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, int]:
    """Return TFLOP/s, and in how many rows of the result something is wrong."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = seconds_of(lambda: matmul(a, b), device, repeats=20 if on_gpu else 3)
    return 2 * size**3 / seconds / 1e12, _wrong_rows(device, size // 2, dtype, matmul)


def _wrong_rows(device: torch.device, size: int, dtype: torch.dtype, matmul: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Multiply whole numbers small enough that every sum is exact, and compare without any tolerance.

    (A B) v = A (B v) for vectors v of -1, 0, 1 takes far less than a second product; a single wrong entry escapes 16 of
    them once in 40 million times.
    """
    entries = torch.tensor([-1, 1, 0, 0, 0, 0, 0, 0], device=device, dtype=dtype)
    a, b = (entries[torch.randint(8, (size, size), device=device)] for _ in range(2))
    vectors = torch.randint(-1, 2, (size, 16), device=device).double()
    found = matmul(a, b).double() @ vectors
    return int((found != a.double() @ (b.double() @ vectors)).any(dim=1).sum())


def _gemm_finding(device: torch.device, tflops: float, wrong_rows: int, median: float) -> Finding:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    check = f"matrix product on {device}"
    found = f"{tflops:.3g} TFLOP/s, {name}"
    if wrong_rows:
        fix = "This device computes wrongly. Take the node out of use and test its memory (dcgmi diag -r 3)."
        return Finding(check, Status.wrong, f"{wrong_rows} rows of a product are wrong, {name}", fix)
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    if peak is not None and tflops < MIN_SHARE_OF_PEAK * peak:
        fix = "Look for other processes, power limits and heat: nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE."
        return Finding(check, Status.slow, f"{found}: {tflops / peak:.0%} of its peak of {peak}", fix, required=False)
    if tflops < MIN_SHARE_OF_MEDIAN * median:
        fix = "It holds up all others: nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE."
        return Finding(check, Status.slow, f"{found}, {median:.3g} on the others", fix, required=False)
    return Finding(check, Status.ok, found)


def check_scan(device: torch.device, scan: Callable[..., Tensor] | None = None) -> Finding:
    """Compare the scan that training uses on this device, forward and backward, with its definition.

    On a GPU that is the whole core of a Mamba mixer, compared with plain torch in float64.

    Args:
        scan: instead of the one that training uses.
    """
    check = f"state-space scan on {device}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        ours, exact, inputs = _core_on_gpu(device) if device.type == "cuda" else _scan_on_cpu()
        ours = scan or ours
        difference = _largest_difference(ours, exact, inputs)
        seconds = seconds_of(lambda: _with_gradients(ours, inputs), device, repeats=5)
    except Exception as error:
        fix = "Check the packages above; kernels must be built for the torch that is here."
        return Finding(
            check, Status.wrong, f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", fix
        )
    name = best_operations(device, dtype).name
    found = f"{seconds * 1e3:.3g} ms forward and backward ({name}), differs by {difference:.1e}"
    if not difference <= TOLERANCE[dtype]:
        fix = f"More than {TOLERANCE[dtype]:.0e} is no rounding. See which part: bash launch/test.sh tests/ops."
        return Finding(check, Status.wrong, found, fix)
    return Finding(check, Status.ok, found)


Scan = Callable[..., Tensor]


def _scan_on_cpu() -> tuple[Scan, Scan, list[Tensor]]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 4, 32, generator=random)
    dt = torch.rand(1, 256, 4, generator=random) + 0.01
    a = -torch.rand(4, generator=random) - 0.1
    b, c = (torch.randn(1, 256, 2, 16, generator=random) for _ in range(2))
    d = torch.randn(4, generator=random)
    return (lambda *t: ssd(*t, chunk_size=32)), ssd_recurrence, [x, dt, a, b, c, d]


def _core_on_gpu(device: torch.device) -> tuple[Scan, Scan, list[Tensor]]:
    sizes = MixerSizes(heads=32, head_dim=80, groups=2, state=128, conv_kernel=4, chunk=128, epsilon=1e-5)
    random = torch.Generator().manual_seed(0)
    shapes = CoreWeights(
        (sizes.conv_channels, 4), (sizes.conv_channels,), (sizes.heads,), (sizes.heads,), (sizes.heads,), (sizes.inner,)
    )
    weights = CoreWeights(*(torch.randn(shape, generator=random) for shape in shapes))
    weights = weights._replace(dt_bias_H=weights.dt_bias_H - 3.0, A_H=-weights.A_H.exp())
    projection = torch.randn(1024, 1, sizes.inner + sizes.conv_channels + sizes.heads, generator=random)
    fast = best_operations(device, torch.bfloat16).mamba_core

    def run(core: Callable[..., Tensor]) -> Scan:
        return lambda zxbcdt, *rest: core(zxbcdt, CoreWeights(*rest), sizes, None)

    in_float32 = {"dt_bias_H", "A_H", "D_H"}  # in training, too
    rounded = [w if name in in_float32 else w.bfloat16() for name, w in weights._asdict().items()]
    return run(fast), run(mamba_core), [t.to(device) for t in (projection.bfloat16(), *rounded)]


def _largest_difference(ours: Scan, exact: Scan, inputs: Sequence[Tensor]) -> float:
    """Over the output and the gradient of every input, in shares of their norm."""
    found, expected = _with_gradients(ours, inputs), _with_gradients(exact, inputs, exactly=True)
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def _with_gradients(function: Scan, inputs: Sequence[Tensor], *, exactly: bool = False) -> list[Tensor]:
    """Return the output and the gradients of the inputs, computed in float64 where `exactly`."""
    leaves = [(t.double() if exactly else t).detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    cotangent = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def seconds_of(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Return the median time of `work`, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
