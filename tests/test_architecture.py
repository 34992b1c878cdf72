"""The rules of the house: who may import whom, and how large things may grow. See docs/design.md."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemotron_train"
TOOLS = ROOT / "data_tools"

# A part may import parts of a lower level, and itself. Files directly in the package are parts of their own.
LEVELS = [
    {"errors"},
    {"config"},
    {"plan"},
    {"platform"},
    {"engine", "precision", "data", "ops"},
    {"model", "optim"},
    {"loss", "runtime"},
    {"checkpoint", "observe"},
    {"forward", "step", "evaluate"},
    {"trainer"},
    {"train", "convert", "generate", "doctor", "probe"},
]
# Edges between parts of one level, with the reason.
SIDEWAYS = {
    ("engine", "ops"): "layers are built out of operations",
    ("engine", "data"): "the pipeline schedule is fed with batches",
    ("engine", "precision"): "linear layers run in the precision of a recipe",
    ("optim", "model"): "weight decay goes by parameter name",
    ("step", "forward"): "a step is made of micro-batches",
    ("evaluate", "step"): "evaluation averages as a step does",
}
# library -> where it may be imported, as path prefixes below the package
ONLY_IN = {
    "megatron": ("engine/", "model/", "checkpoint/"),
    "transformer_engine": ("engine/", "precision/", "ops/"),
    "transformer_engine_torch": ("ops/",),
    "mamba_ssm": ("ops/",),
    "causal_conv1d": ("ops/",),
    "triton": ("ops/",),
    "wandb": ("observe/",),
    "transformers": ("convert/",),
    "safetensors": ("convert/",),
    "hydra": ("config/load.py",),
    "recipes": ("config/load.py",),
}
# library -> where it may not be
NOT_IN = {
    "torch": ("config/", "plan/", "errors.py"),
    "numpy": ("config/", "plan/", "errors.py"),
    "megatron": ("model/reference/",),
}
# (file, module) -> why this import stands in a function, a class or a `try`
INNER_IMPORTS: dict[tuple[str, str], str] = {
    ("engine/layer_parts.py", "nemotron_train.engine.te_layers"): "needs Transformer Engine",
    ("engine/user_buffers.py", "transformer_engine.pytorch"): "needs Transformer Engine",
    ("ops/implementations.py", "nemotron_train.ops.mamba_ssm_core"): "needs mamba-ssm",
    ("ops/implementations.py", "nemotron_train.ops.triton_core"): "needs causal-conv1d",
    ("plan/__main__.py", "nemotron_train.plan.picture"): "only one answer is a picture, and matplotlib loads slowly",
    ("data_tools/encoders.py", "gigatoken"): "optional, and slow to import",
    ("data_tools/executors.py", "ray"): "optional",
    ("ops/implementations.py", "nemotron_train.ops.te_squared_relu"): "needs Transformer Engine",
    ("ops/implementations.py", "nemotron_train.ops.triton_cross_entropy"): "needs Triton",
    ("doctor/__main__.py", "nemotron_train.doctor.measurements"): "needs torch, and has to say so where it is broken",
    ("doctor/__main__.py", "nemotron_train.doctor.table"): "needs rich",
}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 80, 7


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    return list(imports_of(parsed(path)))


def imports_of(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Yield every module that is imported; `from a import b` counts as `a.b`, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import, which these rules cannot read"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def level_of(part: str) -> int:
    levels = [level for level, parts in enumerate(LEVELS) if part in parts]
    assert levels, f"{part} has no level: add it to LEVELS"
    return levels[0]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_imports_go_downward(path: Path) -> None:
    """Fails if a part imports one above it or, without being listed, one beside it."""
    part = part_of(path)
    if part == "__init__":
        return
    for module, node in imports(path):
        package, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if package == "data_tools":
            pytest.fail(f"{name_of(path)}:{node.lineno} imports the tools, which stand above the package")
        if package != "nemotron_train" or other == part:
            continue
        allowed = level_of(other) < level_of(part) or (part, other) in SIDEWAYS
        assert allowed, f"{name_of(path)}:{node.lineno} ({part}) imports {module}: {other} is not below {part}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    """Fails if Megatron-Core, an optional library, or torch is imported outside its places."""
    name = name_of(path)
    for module, node in imports(path):
        library = module.split(".")[0]
        if library in ONLY_IN:
            assert name.startswith(ONLY_IN[library]), f"{name}:{node.lineno}: {library} is only for {ONLY_IN[library]}"
        if library in NOT_IN:
            assert not name.startswith(NOT_IN[library]), f"{name}:{node.lineno}: no {library} in {NOT_IN[library]}"


@pytest.mark.parametrize("path", sources(TOOLS), ids=name_of)
def test_the_tools_use_only_data_and_what_is_below(path: Path) -> None:
    """Fails if preparing data starts to need the engine."""
    for module, node in imports(path):
        if module.startswith("nemotron_train."):
            part = module.split(".")[1]
            assert part in {"data", "errors", "config", "plan"}, f"{name_of(path)}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", sources(PACKAGE, TOOLS), ids=name_of)
def test_imports_stand_at_the_top(path: Path) -> None:
    """Fails if an import hides in a function or a `try` without being listed with its reason."""
    tree = parsed(path)
    type_checking = [node for block in tree.body if _is_type_checking(block) for node in ast.walk(block)]
    top = {id(node) for node in [*tree.body, *type_checking]}
    hidden = {(name_of(path), module) for module, node in imports_of(tree) if id(node) not in top}
    assert hidden <= set(INNER_IMPORTS)


def test_listed_exceptions_are_still_needed() -> None:
    """Fails if an import that was listed as an exception is gone."""
    for name, module in INNER_IMPORTS:
        folder = ROOT if name.startswith("data_tools/") else PACKAGE
        assert module in {imported for imported, _ in imports(folder / name)}
    found = {(part_of(path), module.split(".")[1]) for path in sources(PACKAGE) for module, _ in imports(path)
             if module.startswith("nemotron_train.")}  # fmt: skip
    assert set(SIDEWAYS) <= found


@pytest.mark.parametrize("path", sources(PACKAGE, TOOLS), ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    """Fails if a file or function outgrows what a reader takes in."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{name_of(path)}: {node.name} has {lines} lines"
            if _is_triton_kernel(node):
                continue
            parameters = len(node.args.args + node.args.kwonlyargs) - _is_bound(node)
            assert parameters <= MAX_PARAMETERS, f"{name_of(path)}: {node.name} has {parameters} parameters"


@pytest.mark.parametrize("path", sources(PACKAGE, TOOLS), ids=name_of)
def test_names_say_what_is_inside(path: Path) -> None:
    """Fails if a file is named after nothing in particular, or does not say what it answers."""
    assert not BANNED_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    tree = parsed(path)
    assert path.name == "__init__.py" or ast.get_docstring(tree), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", sources(PACKAGE, TOOLS), ids=name_of)
def test_nothing_is_printed(path: Path) -> None:
    """Fails if a `print` bypasses the log and would come from every rank."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name_of(path)}:{node.lineno}"


def _is_bound(function: ast.FunctionDef) -> bool:
    return bool(function.args.args) and function.args.args[0].arg in (
        "self",
        "cls",
        "ctx",
    )  # ctx: torch.autograd.Function


def _is_triton_kernel(function: ast.FunctionDef) -> bool:
    """A kernel reads nothing but its parameters: every stride and every size is one."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
