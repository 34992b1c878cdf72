"""What does `python -m nemotron_train.doctor` say, and how does it end?"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_train.doctor import __main__ as doctor
from nemotron_train.doctor.findings import Finding, Status

REPOSITORY = Path(__file__).parents[2]
SICK = [Finding("torch", Status.ok, "2.13"), Finding("mamba-ssm", Status.missing, "not installed", "pip install it")]


def test_json_is_one_object_a_line_and_the_exit_code_follows_the_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a script cannot read the findings, or a missing package ends with 0."""
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: SICK)
    assert doctor.main(["--quick", "--format", "json"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["status"] for record in records] == ["ok", "missing"]
    assert {record["host"] for record in records} == {socket.gethostname()}
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: SICK[:1])
    assert doctor.main(["--quick", "--format", "json"]) == 0


def test_the_table_names_what_is_missing_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a person has to guess what to do."""
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: SICK)
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert "mamba-ssm (missing): pip install it" in output
    assert "must be mended" in output


def test_without_torch_the_doctor_still_answers(tmp_path: Path) -> None:
    """Fails if the program that is to name a broken torch dies of it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')\n")
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_train.doctor", "--quick", "--format", "json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["status"], "libcudart.so.13" in last["found"]) == ("wrong", True)
