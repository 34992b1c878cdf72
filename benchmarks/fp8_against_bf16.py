"""Does a model of some size learn the same in FP8 as in bf16?

    python -m benchmarks.fp8_against_bf16 OUTPUT PRECISION... [-- key=value ...]

Trains one model of 309 million parameters on the text that the quickstart prepares (`launch/quickstart.sh` leaves it in
runs/quickstart-data, and takes the same keys) once in each precision, with the same weights, tokens and rates. Writes
all curves into OUTPUT/fp8_against_bf16.png and prints how far each is from the first over the last 50 steps.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

LAST = 50  # steps that are compared
SMOOTHED = 10  # steps of the running mean in the picture
RUN = (
    "experiment=quickstart",
    "model.layer_pattern=M-M-M*-M-M-M*-M-M-",
    "model.hidden_size=1536",
    "model.ffn_hidden_size=6144",
    "model.num_attention_heads=12",
    "model.num_query_groups=4",
    "model.attention_head_dim=128",
    "model.mamba_num_heads=48",
    "model.mamba_head_dim=64",
    "model.mamba_num_groups=8",
    "model.mamba_state_dim=128",
    "model.mamba_chunk_size=128",
    "train.seq_length=1024",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.train_tokens=13_107_200",  # 400 steps
    "train.eval_every_steps=0",
    "lr.peak=6e-4",
    "lr.min=6e-6",
    "lr.warmup_tokens=1_310_720",
    "lr.decay_tokens=5_242_880",
    "data.max_epochs=100",
    "checkpoint=at_end",
)


def losses(run_dir: Path) -> NDArray[np.float64]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records if "loss" in record])


def main(arguments: list[str]) -> None:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    output, precisions, overrides = Path(arguments[0]), arguments[1:cut], arguments[cut + 1 :]
    curves = {}
    for precision in precisions:
        run_dir = output / precision
        keys = [*RUN, f"precision={precision}", f"run.name={precision}", f"run.dir={run_dir}", *overrides]
        subprocess.run([sys.executable, "-m", "nemotron_train.train", *keys], check=True)
        curves[precision] = losses(run_dir)
        first = curves[precisions[0]]
        gap = curves[precision][-LAST:].mean() / first[-LAST:].mean() - 1
        print(f"{precision}: mean loss of the last {LAST} steps {curves[precision][-LAST:].mean():.4f}, {gap:+.3%}")
    figure, axes = plt.subplots(figsize=(9, 5))
    for precision, curve in curves.items():
        smooth = np.convolve(curve, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
        axes.plot(np.arange(SMOOTHED, len(curve) + 1), smooth, label=precision, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, nats a token (mean of {SMOOTHED} steps)")
    axes.set_title("309M-parameter hybrid, the same weights, tokens and rates")
    axes.legend()
    figure.savefig(output / "fp8_against_bf16.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(sys.argv[1:])
