"""The architecture as a table: imports go down only, the oracle stands apart, importing costs next to nothing."""

import ast
import sys
from pathlib import Path

import pytest

import barlow_loss
from programs import Nursery, Program, start

PACKAGE = Path(barlow_loss.__file__).parent

# Top to bottom; a module imports from lower rows only. "" is the package itself, barlow_loss/__init__.py.
LAYERS = [
    {"", "lightning"},
    {"monitoring"},
    {"diagnostics", "mixed"},
    {"loss", "normalization", "projector", "vicreg", "_ranks", "_report"},
    {"_function", "_normalize", "_rows", "_vicreg"},
    {"_primal", "_dual_sharded", "_gram_norm"},
    {"_dual"},
    {"_backends"},
    {"_backends.triton"},
    {"_backends.triton._views"},
    {"_backends.triton._input_gradients"},
    {
        "_backends.triton._frobenius",
        "_backends.triton._loss_terms",
        "_backends.triton._standardize",
    },
    {"_backends.triton._launch"},
    {"_backends.eager"},
    {"_header", "_validation_relatives"},
    {"_checkpoints", "_loss_terms", "_plain", "_statistics", "_target", "_validation"},
    {"_plan", "_collectives"},
    {"_gram", "_module", "_pairs", "_waiting"},
]
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}
ORACLE = "reference"


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _runtime_imports(tree: ast.AST):
    """Every absolute module name that executing the file may import, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _runtime_imports(node)


def _imports_of(module: str) -> set[str]:
    return set(_runtime_imports(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def _package_imports_of(module: str) -> set[str]:
    """The same within the package, as the names of this file's table."""
    found = set()
    for name in _imports_of(module):
        if name == "barlow_loss" or name.startswith("barlow_loss."):
            inner = name.removeprefix("barlow_loss").removeprefix(".")
            # `from barlow_loss.loss import f` names an attribute of a module, `from barlow_loss import _dual` a module.
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def test_every_module_has_a_layer():
    assert set(MODULES) == set(LEVEL) | {ORACLE}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {ORACLE}))
def test_imports_go_down_only(module):
    """Strictly down, so there can be no cycle."""
    upward = {name for name in _package_imports_of(module) if name == ORACLE or LEVEL[name] <= LEVEL[module]}
    assert not upward, f"barlow_loss.{module} imports {upward}, which do not lie below it"


def test_the_table_sees_the_imports():
    """The reader of imports finds what is plainly there; an empty answer would pass every test above."""
    assert "loss" in _package_imports_of("")
    assert "_function" in _package_imports_of("loss")
    assert {"_primal", "_dual", "_backends", "_plan"} <= _package_imports_of("_function")


def test_the_oracle_stands_apart():
    """It imports nothing of the package and nothing of the package imports it."""
    assert not _package_imports_of(ORACLE)
    assert not [module for module in MODULES if ORACLE in _package_imports_of(module)]


def test_the_algorithms_import_no_backend_module():
    """They receive their primitives; only `_backends` itself knows its modules."""
    users = {module for module in MODULES for name in _package_imports_of(module) if name.startswith("_backends.")}
    assert {user.partition(".")[0] for user in users} == {"_backends"}


def test_only_collectives_imports_torch_distributed():
    users = {module for module in MODULES if any(name.startswith("torch.distributed") for name in _imports_of(module))}
    assert users == {"_collectives"}


def test_the_only_dependency_is_torch():
    """And of what is imported where it was chosen: triton in its backend, Lightning in the callback."""
    allowed = {"torch", "barlow_loss"} | set(sys.stdlib_module_names)
    for module in MODULES:
        chosen = {"triton"} if module.startswith("_backends.triton") else set()
        chosen |= {"lightning", "pytorch_lightning"} if module == "lightning" else set()
        imported = {name.partition(".")[0] for name in _imports_of(module)}
        assert imported <= allowed | chosen, module


def test_nothing_imports_what_needs_lightning():
    assert not [module for module in MODULES if "lightning" in _package_imports_of(module)]


@pytest.fixture(scope="module")
def with_torch():
    """Starts programs in which ``import torch`` is already done."""
    with Nursery("torch") as nursery:
        yield nursery


def _run(program: Program) -> str:
    with program:
        assert program.wait() == 0, program.errors
    return program.output


def test_importing_adds_no_other_library(with_torch, tmp_path):
    """What `import barlow_loss` loads beyond `import torch` is itself and the standard library."""
    code = "import sys, torch; before = set(sys.modules); import barlow_loss; print(*sorted(set(sys.modules) - before))"
    new = _run(with_torch.start(["-c", code], tmp_path)).split()
    assert "barlow_loss" in new
    assert {name.partition(".")[0] for name in new} <= {"barlow_loss", "torch"} | set(sys.stdlib_module_names)


def test_works_where_triton_numpy_and_torchvision_cannot_be_imported(tmp_path):
    code = (
        "import sys\n"
        "for name in ('triton', 'numpy', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "import warnings; warnings.filterwarnings('ignore', message='Failed to initialize NumPy')\n"
        "import torch, barlow_loss\n"
        "z1, z2 = torch.randn(2, 8, 32).requires_grad_()\n"
        "loss = barlow_loss.BarlowTwinsLoss()(z1, z2); loss.backward()\n"
        "print(barlow_loss.collapse_report(z1.detach(), z2.detach()))\n"
        "print(bool(loss.isfinite()))\n"
    )
    assert _run(start([sys.executable, "-c", code], tmp_path)).split()[-1] == "True"


def test_auto_never_imports_triton_for_cpu_tensors(with_torch, tmp_path):
    """Forward and backward, in both algorithms; torch itself does not load it either."""
    code = (
        "import sys, torch, barlow_loss\n"
        "for algorithm in ('primal', 'dual'):\n"
        "    z1, z2 = torch.randn(2, 8, 32).requires_grad_()\n"
        "    barlow_loss.barlow_twins_loss(z1, z2, algorithm=algorithm).backward()\n"
        "print(*[name for name in sys.modules if name == 'triton' or name.startswith('barlow_loss._backends.triton')])"
    )
    assert _run(with_torch.start(["-c", code], tmp_path)).split() == []


def test_import_time_over_torch(with_torch, tmp_path):
    """Below 50 ms of processor time in the best of five processes: busy neighbours only add. Printed with -s.

    From the second one on there is bytecode, as in every installation, whatever PYTHONDONTWRITEBYTECODE says here.
    """
    code = (
        "import sys, time, torch\n"
        f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path / 'bytecode')!r}\n"
        "start = time.process_time()\n"
        "import barlow_loss\n"
        "print(1e3 * (time.process_time() - start))"
    )
    milliseconds = [float(_run(with_torch.start(["-c", code], tmp_path))) for _ in range(5)]
    print(f"\nimport barlow_loss over import torch: {min(milliseconds):.1f} ms of {milliseconds}")
    assert min(milliseconds) < 50
