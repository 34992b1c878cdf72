"""Can every source be told apart, and found, in the picture of a blend? Oracle: the drawn figure itself."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from data_tools.blend_report import draw


@pytest.mark.parametrize("count", [3, 10, 45])
def test_every_source_has_its_colour_its_name_and_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Fails if colours repeat, names are cut off at the edge of the picture, or a bar is not a weight."""
    weights = {f"source_{number:02d}": (1 + number) / (count * (count + 1) / 2) for number in range(count)}
    phases = [{"start_tokens": s, "end_tokens": s + 10**12, "weights": weights} for s in (0, 10**12)]
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    report = {"experiment": "x", "train_tokens": 2 * 10**12, "sources": dict.fromkeys(weights), "phases": phases}
    draw(report, tmp_path / "blend.png")
    [figure] = drawn
    [axes], [legend] = figure.axes, figure.legends
    assert len({bar.get_facecolor() for bar in axes.patches}) == count
    assert sorted(text.get_text() for text in legend.texts) == sorted(weights)
    assert [bar.get_height() for bar in axes.patches[::2]] == pytest.approx(list(weights.values()))
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0 <= box.y0
    assert box.x1 <= whole.x1
    assert box.y1 <= whole.y1
