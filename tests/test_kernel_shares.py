"""Does the table of kernel shares know our own kernels?"""

import ast
from pathlib import Path

import pytest

from benchmarks.kernel_shares import group_of

OPS = Path(__file__).parents[1] / "nemotron_train" / "ops"
GROUPS = {  # of all kernels that a file launches
    "triton_cross_entropy.py": {"cross-entropy"},
    "triton_gated_norm.py": {"gated norm"},
    "triton_row_sums.py": {"embedding"},
    "triton_ssd.py": {"Mamba scan"},
}


def launched(path: Path) -> set[str]:
    """Name the kernels that a file starts, as `kernel[grid](...)`."""
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {ast.unparse(call.value).split(".")[-1] for call in calls if isinstance(call, ast.Subscript)}


@pytest.mark.parametrize("path", sorted(OPS.glob("triton_*.py")), ids=lambda path: path.name)
def test_our_kernels_are_in_their_group(path: Path) -> None:
    """Fails if a kernel is renamed, or a new one counts among the others."""
    assert {group_of(name) for name in launched(path)} == GROUPS.get(path.name, set())
