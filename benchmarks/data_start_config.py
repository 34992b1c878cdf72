"""The run of 20T tokens that `benchmarks.data_start` starts: 60 sources, three phases, as a recipe would say it."""

from pathlib import Path

from nemotron_train.config.schema import (
    DataSection,
    ModelSection,
    PhaseConfig,
    RunConfig,
    RunSection,
    SourceConfig,
    SourceWeight,
    TrainSection,
)


def config_of(folder: Path) -> RunConfig:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())

    def weights(step: int) -> list[SourceWeight]:
        return [SourceWeight(name, float(1 + number * step % 4)) for number, name in enumerate(names)]

    batch = 736 * 8192
    starts = (0, 12 * 10**12 // batch * batch, 18 * 10**12 // batch * batch)
    return RunConfig(
        run=RunSection(name="start", dir=str(folder / "run")),
        model=ModelSection(vocab_size=131_072),
        data=DataSection(
            path=str(folder),
            sources=[SourceConfig(name, [f"{name}/{name}_*"]) for name in names],
            phases=[PhaseConfig(start, weights(step + 1)) for step, start in enumerate(starts)],
        ),
        train=TrainSection(train_tokens=20 * 10**12, seq_length=8192, global_batch_size=736),
    )
