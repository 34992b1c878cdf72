"""Is every package there, in a version that this code is written for, and can it be imported?

Needs nothing but Python itself: it has to work where nothing else does.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from nemotron_train.doctor.findings import Finding, Status

IMPORT_SECONDS = 300  # for all packages together, over a slow network file system


class Needed(str, Enum):
    always = "always"
    cuda = "cuda"  # to train on GPUs
    optional = "optional"


@dataclass(frozen=True)
class Package:
    name: str  # as pip calls it
    module: str
    supported: str = ""  # versions, as pip takes them: ==, >= and <
    needed: Needed = Needed.always
    purpose: str = ""  # of an optional one

    @property
    def wanted(self) -> str:
        """The requirement as pip takes it."""
        return self.name + self.supported

    def supports(self, version: str) -> bool:
        found = _release(version)
        for sign, bound in re.findall(r"(==|>=|<)([\d.]+)", self.supported):
            holds = {"==": found == _release(bound), ">=": found >= _release(bound), "<": found < _release(bound)}
            if not holds[sign]:
                return False
        return True


# The supported set: pyproject.toml's, held to it by a test.
PACKAGES = (
    Package("torch", "torch", ">=2.7"),
    Package("megatron-core", "megatron.core", "==0.16.1"),
    Package("hydra-core", "hydra", ">=1.3.2,<1.4"),
    Package("omegaconf", "omegaconf", ">=2.3,<2.4"),
    Package("pyyaml", "yaml", ">=6"),
    Package("numpy", "numpy"),
    Package("psutil", "psutil"),
    Package("rich", "rich"),
    Package("matplotlib", "matplotlib"),
    Package("tokenizers", "tokenizers", ">=0.20"),
    Package("pyarrow", "pyarrow"),
    Package("zstandard", "zstandard"),
    Package("xxhash", "xxhash"),
    Package("orjson", "orjson"),
    Package("transformer-engine", "transformer_engine.pytorch", ">=2.11,<3", Needed.cuda),
    Package("mamba-ssm", "mamba_ssm", ">=2.3", Needed.cuda),
    Package("causal-conv1d", "causal_conv1d", ">=1.6", Needed.cuda),
    Package("gigatoken", "gigatoken", ">=0.10", Needed.optional, "tokenizes text fast"),
    Package("wandb", "wandb", "", Needed.optional, "log=wandb"),
    Package("transformers", "transformers", ">=5", Needed.optional, "exports to Hugging Face's format"),
)


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(version: Sequence[int] = tuple(sys.version_info[:3])) -> Finding:
    found = ".".join(map(str, version))
    if tuple(version) < (3, 10):
        return Finding("Python", Status.wrong, found, "Use Python 3.10 or newer (PYTHON=... bash launch/setup.sh).")
    return Finding("Python", Status.ok, f"{found} ({sys.executable})")


def check_packages(
    packages: Sequence[Package],
    *,
    try_imports: bool = True,
    version_of: Callable[[str], str | None] = installed_version,
) -> list[Finding]:
    """Return a finding for each package.

    Args:
        try_imports: also import those that are there, in another process; takes seconds.
        version_of: installed version by pip's name, None where there is none.
    """
    versions = {package.name: version_of(package.name) for package in packages}
    errors: Mapping[str, str] = {}
    if try_imports:
        errors = import_errors([package.module for package in packages if versions[package.name] is not None])
    return [_finding(package, versions[package.name], errors.get(package.module)) for package in packages]


def _finding(package: Package, version: str | None, import_error: str | None) -> Finding:
    required = package.needed is not Needed.optional
    install = f"pip install -c constraints.txt '{package.wanted}'"
    if package.needed is Needed.cuda:
        install = f"pip install --no-build-isolation '{package.wanted}', or use the image of docker/Dockerfile"
    if version is None:
        if not required:
            return Finding(package.name, Status.skipped, f"not installed ({package.purpose})", install, required=False)
        return Finding(package.name, Status.missing, "not installed", install, required)
    if not package.supports(version):
        return Finding(package.name, Status.wrong, f"{version}, supported is {package.wanted}", install, required)
    if import_error is not None:
        fix = f"Reinstall it against the torch that is here: pip install --force-reinstall --no-deps '{package.wanted}'"
        return Finding(package.name, Status.wrong, f"{version}, but its import fails: {import_error}", fix, required)
    return Finding(package.name, Status.ok, version, required=required)


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version: 2.11.0a0+cu130 is (2, 11); trailing zeros mean nothing."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """Import modules in another process, which a broken binary may crash; return what went wrong, by module."""
    errors: dict[str, str] = {}
    left = list(modules)
    while left:
        outcomes, ending = _import_in_child(left)
        errors |= {module: error for module, error in outcomes.items() if error}
        left = left[len(outcomes) :]
        if left and ending:  # the child died over the first one that it did not speak of
            errors[left.pop(0)] = ending
    return errors


# Prints a line of JSON for each module: an import may print lines of its own.
_IMPORTER = """
import importlib, json, sys
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        error = ""
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    print(json.dumps({"nemotron_train.doctor": module, "error": error}), flush=True)
"""


def _import_in_child(modules: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return what the child said of each module it came to, and how it ended where that was before the last."""
    command = [sys.executable, "-c", _IMPORTER, *modules]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
        output, ending = child.stdout, f"the interpreter died (exit code {child.returncode})"
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode() if isinstance(expired.stdout, bytes) else (expired.stdout or "")
        ending = f"not done after {IMPORT_SECONDS} s"
    outcomes = {}
    for line in output.splitlines():
        if line.startswith('{"nemotron_train.doctor"'):
            record = json.loads(line)
            outcomes[record["nemotron_train.doctor"]] = record["error"]
    return outcomes, ending
