"""Is a broken installation named? Versions are given as data; broken modules are real files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_train.doctor.findings import Status
from nemotron_train.doctor.versions import PACKAGES, Needed, Package, check_packages, check_python, import_errors

ENGINE = Package("transformer-engine", "transformer_engine.pytorch", ">=2.11,<3", Needed.cuda)


def having(version: str | None) -> Callable[[str], str | None]:
    return lambda name: version


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.11.0", Status.ok), ("2.11", Status.ok), ("2.99.1.post1+cu130", Status.ok), ("2.12.0a0+1234abc", Status.ok),
        ("2.10.9", Status.wrong), ("2.9.0", Status.wrong), ("3.0.0", Status.wrong), ("3", Status.wrong),
        (None, Status.missing),
    ],
)  # fmt: skip
def test_a_version_outside_the_supported_set_is_named_with_the_fix(version: str | None, status: Status) -> None:
    """Fails if versions are compared as text (2.9 above 2.11), a bound is shifted, or nothing says what to install."""
    (finding,) = check_packages([ENGINE], try_imports=False, version_of=having(version))
    assert finding.status is status
    assert finding.forbids_training is (status is not Status.ok)
    if status is Status.wrong:
        assert finding.found == f"{version}, supported is transformer-engine>=2.11,<3"
    if status is not Status.ok:
        assert "'transformer-engine>=2.11,<3'" in finding.fix


@pytest.mark.parametrize(
    ("version", "fits"), [("0.16.1", True), ("0.16.1+local", True), ("0.16.0", False), ("0.16.2", False)]
)
def test_an_exact_version_is_exact(version: str, fits: bool) -> None:
    """Fails if another patch release of the engine passes for the one that this code adapts."""
    assert Package("megatron-core", "megatron.core", "==0.16.1").supports(version) is fits


def test_an_optional_package_that_is_missing_is_no_fault_and_a_wrong_one_forbids_nothing() -> None:
    """Fails if a machine without wandb is called unfit."""
    package = Package("wandb", "wandb", ">=0.20", Needed.optional, "log=wandb")
    (missing,) = check_packages([package], try_imports=False, version_of=having(None))
    (old,) = check_packages([package], try_imports=False, version_of=having("0.1"))
    assert (missing.status, old.status, old.forbids_training) == (Status.skipped, Status.wrong, False)


def test_imports_that_fail_or_crash_are_named_and_the_others_still_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a compiled package that takes the interpreter down is not named, or hides what comes after it."""
    (tmp_path / "speaks_first.py").write_text("print('hello')\n")
    (tmp_path / "undefined_symbol.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEa')\n")
    (tmp_path / "kills.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errors = import_errors(["speaks_first", "undefined_symbol", "kills", "no_such_module", "json"])
    assert set(errors) == {"undefined_symbol", "kills", "no_such_module"}
    assert errors["undefined_symbol"] == "ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEa"
    assert errors["kills"] == "the interpreter died (exit code -6)"


def test_a_package_whose_import_fails_is_wrong_whatever_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if only the number is looked at."""
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = Package("mamba-ssm", "built_for_another_torch", ">=2.3")
    (finding,) = check_packages([package], version_of=having("2.3.2"))
    assert finding.forbids_training
    assert finding.found == "2.3.2, but its import fails: ImportError: undefined symbol"
    assert "--force-reinstall" in finding.fix


def test_an_old_python_is_named() -> None:
    """Fails if 3.9 passes, or 3.10 counts as older than 3.9."""
    assert check_python((3, 9, 19)).forbids_training
    assert check_python((3, 10, 0)).status is Status.ok


def test_what_the_tests_run_with_is_supported() -> None:
    """Fails if the supported set refuses the versions that were tested."""
    always = [package for package in PACKAGES if package.needed is Needed.always]
    assert [finding for finding in check_packages(always, try_imports=False) if finding.status is not Status.ok] == []
