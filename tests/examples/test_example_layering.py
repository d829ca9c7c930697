"""The programs stand on one package, and the package on the library; nothing goes in a circle."""

import ast
import graphlib

import pytest
from outcomes import EXAMPLES

MODULES = {
    ".".join(path.relative_to(EXAMPLES).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((EXAMPLES / "barlow_recipes").rglob("*.py"))
}


def imports_of(module: str) -> set[str]:
    """The example's modules that this one imports when it is loaded; relative names resolved."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            found |= {inner if (inner := f"{name}.{alias.name}") in MODULES else name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_reader_sees_the_imports() -> None:
    assert {"barlow_recipes.checkpoint", "barlow_recipes.errors", "barlow_recipes.encoders"} <= imports_of(
        "barlow_recipes.weights"
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_package_knows_nothing_of_the_programs(module: str) -> None:
    assert not imports_of(module) & {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("module", MODULES)
def test_public_names_of_the_library_alone(module: str) -> None:
    assert not [name for name in imports_of(module) if name.startswith("barlow_loss._")]


def test_no_circles() -> None:
    graph = {module: imports_of(module) & set(MODULES) for module in MODULES}
    order = [*graphlib.TopologicalSorter(graph).static_order()]
    assert set(order) >= set(MODULES)
