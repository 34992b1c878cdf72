"""Every experiment composes and says what its golden file says, so that a changed recipe shows in review, resolved."""

from pathlib import Path

import pytest

from nemotron_train.config.load import list_choices, load_config, write_resolved

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "python -m tests.config.regenerate_golden"


@pytest.mark.parametrize("experiment", list_choices("experiment"))
def test_experiment_resolves_to_its_golden_file(experiment: str, tmp_path: Path) -> None:
    """Fails if any value of an experiment changes; if that was meant, write the golden files again and review."""
    write_resolved(load_config([f"experiment={experiment}"]), tmp_path / "resolved.yaml")
    golden = GOLDEN / f"{experiment}.yaml"
    assert golden.exists(), f"run {REGENERATE}"
    assert (tmp_path / "resolved.yaml").read_text() == golden.read_text(), f"if this was meant, run {REGENERATE}"


def test_no_golden_file_is_left_without_an_experiment() -> None:
    """Fails if an experiment is renamed or removed and its golden file stays."""
    assert sorted(path.stem for path in GOLDEN.glob("*.yaml")) == list_choices("experiment")
