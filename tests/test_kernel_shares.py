"""Does the table of kernel shares know our own kernels?"""

import ast
from pathlib import Path

import pytest

from benchmarks.kernel_shares import group_of

OPS = Path(__file__).parents[1] / "nemotron_train" / "ops"
GROUPS = {  # of the kernels that a file launches
    "triton_cross_entropy.py": {"cross-entropy"},
    "triton_gated_norm.py": {"gated norm"},
    "triton_row_sums.py": {"embedding"},
    "triton_scan.py": {"Mamba scan"},
    "triton_steps.py": {"Mamba scan"},
}


def kernels(path: Path) -> list[str]:
    """Name the Triton functions that are not part of another; those have a leading underscore."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [
        node.name
        for node in functions
        if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
        and not node.name.startswith("_")
    ]


@pytest.mark.parametrize("path", sorted(OPS.glob("triton_*.py")), ids=lambda path: path.name)
def test_our_kernels_are_in_their_group(path: Path) -> None:
    """Fails if a kernel is renamed, or a new one counts among the others."""
    assert {group_of(name) for name in kernels(path)} == GROUPS.get(path.name, set())
