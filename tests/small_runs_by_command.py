"""The small run of `small_runs`, said as overrides of a command line; for tests that start programs."""

from pathlib import Path

STEP_TOKENS = 32 * 8


def small_overrides(corpus: Path, run_dir: Path, *, steps: int) -> list[str]:
    """A five-layer model of 34k parameters over source `a` of the corpus, saved every 100 steps, every step logged."""
    return [
        "experiment=own_text", f"run.dir={run_dir}", f"data.path={corpus}",
        "data.sources=[{name: text, prefixes: [a], eval_prefixes: [a_heldout]}]", "data.max_epochs=1e4",
        'model.layer_pattern="M-M*-"', "model.vocab_size=96", "model.hidden_size=32", "model.ffn_hidden_size=64",
        "model.attention_head_dim=8", "model.mamba_head_dim=8", "model.mamba_state_dim=8", "model.mamba_chunk_size=16",
        f"train.train_tokens={steps * STEP_TOKENS}", "train.seq_length=32", "train.global_batch_size=8",
        "train.micro_batch_size=2", "train.eval_every_steps=0", "lr.warmup_tokens=0", "lr.decay_tokens=2560",
        "checkpoint.every_steps=100", "log.every_steps=1",
    ]  # fmt: skip
