"""Do the images, pyproject.toml, constraints.txt and the doctor name the same versions? Each is read as it stands."""

import os
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemotron_train.doctor.versions import PACKAGES, Needed, Package
from tests.test_architecture import PACKAGE, TOOLS, imports, sources

REPOSITORY = Path(__file__).parents[2]
GPU_IMAGE = (REPOSITORY / "docker" / "Dockerfile").read_text()
CPU_IMAGE = (REPOSITORY / "docker" / "Dockerfile.cpu").read_text()
PAGE = (REPOSITORY / "docker" / "README.md").read_text()
PROJECT = (REPOSITORY / "pyproject.toml").read_text()


def requirements(text: str) -> dict[str, SpecifierSet]:
    """Every quoted requirement of pyproject.toml's lists, by name; Python 3.10 has no reader of TOML."""
    start = text.index("dependencies = [")
    lists = text[start : text.index("[project.scripts]")]
    found: dict[str, SpecifierSet] = {}
    for line in lists.splitlines():
        for quoted in re.findall(r'"([A-Za-z][^"]*)"', line.split(" #")[0]):
            requirement = Requirement(quoted)
            name = requirement.name.lower().replace("_", "-")
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


ASKED = requirements(PROJECT)
TESTED = {
    Requirement(line.split(" #")[0]).name.lower(): Requirement(line.split(" #")[0]).specifier
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
PACKAGE_OF = {  # as pip calls it, by module, where that is another name
    "hydra": "hydra-core", "megatron": "megatron-core", "yaml": "pyyaml",
    "transformer_engine_torch": "transformer-engine",
}  # fmt: skip
IMAGE_PINS = {
    "transformer-engine": re.findall(r"^ARG TRANSFORMER_ENGINE=(.+)$", GPU_IMAGE, re.MULTILINE),
    "causal-conv1d": re.findall(r"^ARG CAUSAL_CONV1D=(.+)$", GPU_IMAGE, re.MULTILINE),
    "mamba-ssm": re.findall(r"^ARG MAMBA_SSM=(.+)$", GPU_IMAGE, re.MULTILINE),
}


def test_every_library_that_is_imported_is_asked_for() -> None:
    """Fails if a library is only there because another one happens to bring it."""
    modules = {module.split(".")[0] for path in sources(PACKAGE, TOOLS) for module, _ in imports(path)}
    imported = {name for name in modules - sys.stdlib_module_names if not (REPOSITORY / name).is_dir()}
    assert {PACKAGE_OF.get(name, name.replace("_", "-")) for name in imported} <= set(ASKED)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_doctor_supports_what_pyproject_asks_for(package: Package) -> None:
    """Fails if a bound was moved in one of the two, or the doctor looks for a package that nothing asks for."""
    assert SpecifierSet(package.supported) == ASKED[package.name]


def test_the_doctor_looks_at_everything_that_is_always_needed() -> None:
    """Fails if a dependency was added to pyproject.toml and not to the doctor."""
    start = PROJECT.index("dependencies = [")
    always = requirements(PROJECT[start : PROJECT.index("]", start)] + "[project.scripts]")
    assert set(always) == {package.name for package in PACKAGES if package.needed is Needed.always}
    for name in {package.name for package in PACKAGES if package.needed is Needed.cuda}:
        assert name in ASKED


@pytest.mark.parametrize("name", IMAGE_PINS)
def test_the_image_pins_each_gpu_package_once_within_what_pyproject_asks_for(name: str) -> None:
    """Fails if the image would bring a version that this code is not written for, or README names another one."""
    (pin,) = IMAGE_PINS[name]
    assert Version(pin) in ASKED[name]
    assert pin in PAGE


@pytest.mark.parametrize("name", sorted(TESTED))
def test_tested_versions_are_supported_ones(name: str) -> None:
    """Fails if constraints.txt, which the CPU image and setup.sh install from, contradicts pyproject.toml."""
    (pin,) = [clause.version for clause in TESTED[name]]
    assert Version(pin) in ASKED.get(name, SpecifierSet())


def test_the_images_install_from_constraints_and_carry_what_they_copy() -> None:
    """Fails if an image stops using the tested versions, lets pip replace the base's torch, or copies what is gone."""
    assert 'pip install -c constraints.txt -e ".[dev]"' in CPU_IMAGE
    assert "grep '^torch==' constraints.txt" in CPU_IMAGE
    held = re.search(r"grep -vE '\^\(([a-z|]+)\)==' constraints\.txt > (\S+)", GPU_IMAGE)
    assert held is not None
    assert set(held[1].split("|")) == {"torch", "numpy", "triton"}
    assert f"pip install -c {held[2]} " in GPU_IMAGE
    for text in (GPU_IMAGE, CPU_IMAGE):
        for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
            for source in line.split()[:-1]:
                assert (REPOSITORY / source).exists(), source


def test_the_image_that_runs_the_tests_copies_what_they_import_and_what_the_pages_link_to() -> None:
    """Fails if a test cannot be imported in the image, or a link that a test follows leads nowhere there."""
    copied = {line.split()[-1] for line in re.findall(r"^COPY (.+)$", CPU_IMAGE, re.MULTILINE)}
    tests = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("*.py")]
    imported = {name for text in tests for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)}
    linked = {
        Path(os.path.relpath(page.parent / target, REPOSITORY)).parts[0]
        for page in (REPOSITORY / "README.md", REPOSITORY / "docs" / "design.md")
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        if not target.startswith("https://")
    }
    needed = {name for name in imported | linked if (REPOSITORY / name).is_dir()}
    assert "tests" in needed
    assert needed <= copied


def test_readme_names_the_base_of_the_image() -> None:
    """Fails if the base image was changed and the page that describes it was not."""
    base = re.search(r"^ARG BASE=\S+/pytorch:(\d\d\.\d\d)-py3$", GPU_IMAGE, re.MULTILINE)
    assert base is not None
    assert f"PyTorch image {base[1]}" in PAGE
