"""Does the ledger tell what a run has read? Oracle: the samples themselves."""

import json
from pathlib import Path

import pytest

from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.data.ledger import NAME, ConsumptionLedger, samples_of_step
from nemotron_train.errors import DataError

S = 16
SOURCES = {"web": 1003, "code": 640}
PHASES = [Phase(0, S, {"web": 0.6, "code": 0.4}), Phase(160, S, {"web": 1.0})]


def test_lines_account_for_every_sample(tmp_path: Path) -> None:
    """Fails if samples, tokens by source or the hash of a step are not those of its samples, or a line is lost."""
    plan = BlendPlan(PHASES, SOURCES, seed=1)
    ledger = ConsumptionLedger(tmp_path, plan)
    for step in range(1, 6):
        ledger.write(step, (step - 1) * 4 * S, step * 4 * S)
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    read = dict.fromkeys(SOURCES, 0)
    for step, line in enumerate(lines, start=1):
        assert line["samples"] == [(step - 1) * 4, step * 4]
        for sample in range(*line["samples"]):
            read[plan.source_names[plan.locate(sample).source]] += S
        assert line["read"] == {name: tokens for name, tokens in read.items() if tokens}
        assert line["past_hash"] == plan.past_hash(step * 4 * S)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    """Fails if a restart of a run throws away what it had read before."""
    plan = BlendPlan(PHASES, SOURCES, seed=1)
    for start in (0, 1):
        ConsumptionLedger(tmp_path, plan).begin(start, [])
        ConsumptionLedger(tmp_path, plan).write(start + 1, start * S, (start + 1) * S)
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [line.get("step", line.get("begins_after_step")) for line in lines] == [0, 1, 1, 2]


def test_a_line_that_a_killed_run_left_half_written_does_not_spoil_the_next(tmp_path: Path) -> None:
    """Fails if what a run says of its data when it goes on is glued to half a line, and lost with it."""
    plan = BlendPlan(PHASES, SOURCES, seed=1)
    ledger = ConsumptionLedger(tmp_path, plan)
    ledger.write(1, 0, 4 * S)
    ledger.write(2, 4 * S, 8 * S)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-30])
    ConsumptionLedger(tmp_path, plan).begin(1, [])
    lines = (tmp_path / NAME).read_text().splitlines()
    assert json.loads(lines[-1]) == {"begins_after_step": 1, "sources": {}}
    assert len(lines) == 3
    assert samples_of_step(tmp_path, 1) == (range(4), 4 * S, plan.past_hash(4 * S))
    assert samples_of_step(tmp_path, 2) is None


@pytest.mark.parametrize("change", [7, {"samples": None}, {"samples": [1]}, {"tokens": [0, "x"]}, {"past_hash": 5}])
def test_a_line_that_accounts_for_nothing_is_refused_with_its_number(tmp_path: Path, change: object) -> None:
    """Fails if damage ends in a traceback, or is passed over as the line of a run that was killed may be."""
    ledger = ConsumptionLedger(tmp_path, BlendPlan(PHASES, SOURCES, seed=1))
    ledger.begin(0, [])
    ledger.write(1, 0, 4 * S)
    good = (tmp_path / NAME).read_text()
    line = {**json.loads(good.splitlines()[1]), **change} if isinstance(change, dict) else change
    (tmp_path / NAME).write_text(good + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=rf"{NAME}, line 3: .* accounts for no step"):
        samples_of_step(tmp_path, 1)
