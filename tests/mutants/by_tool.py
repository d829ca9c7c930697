"""Bugs that nobody has thought of: what the operators of cosmic-ray make of the library."""

import ast
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

from planted import Mutant

MODULES = tuple(
    f"barlow_loss/{name}.py"
    for name in (
        "_loss_terms", "_dual", "_primal", "_statistics", "_normalize", "_header", "_plan", "_function",
        "_backends/eager",
    )
)  # fmt: skip
SHARP = {
    "_header": ("tests/distributed/test_header.py",),
    "_normalize": ("tests/test_normalization.py", "tests/distributed/test_normalization_global.py"),
    "_plan": ("tests/test_plan.py",),
}
# Then the others, from the cheap to the dear.
NEAR = (
    "tests/test_plan.py",
    "tests/test_laws_closed_forms.py",
    "tests/test_laws_exactness.py",
    "tests/test_laws_gradients.py",
    "tests/test_gradients.py",
    "tests/test_contract.py",
    "tests/test_laws_inputs.py",
    "tests/test_normalization.py",
    "tests/test_float16_products.py",
    "tests/test_cost.py",
    "tests/distributed/test_header.py",
    "tests/distributed/test_exactness.py",
    "tests/distributed/test_normalization_global.py",
    "tests/distributed/test_traffic.py",
    "tests/test_compile.py",
    "tests/distributed/test_compiled_steps.py",
)
# On floats they raise: caught by any test at all.
OF_BITS = re.compile("BitAnd|BitOr|BitXor|LShift|RShift|Invert")


def sample(root: Path, number: int, seed: int) -> list[Mutant]:
    """A number of bugs drawn from all that the tool makes, but for those of bits and those without an effect."""
    try:
        from cosmic_ray.ast import ast_nodes, get_ast
        from cosmic_ray.plugins import get_operator, operator_names
    except ImportError:
        raise SystemExit("--tool needs cosmic-ray: pip install cosmic-ray") from None
    kinds = [get_operator(name) for name in operator_names() if not OF_BITS.search(name)]
    operators = [kind() for kind in kinds if not kind.arguments()]
    places: list[tuple[Path, str, Any, int, int]] = []
    for module in MODULES:
        nodes = list(ast_nodes(get_ast((root / module).read_text())))
        for operator in operators:
            starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            places += [(root, module, operator, occurrence, line) for occurrence, (line, _) in enumerate(starts)]
    random.Random(seed).shuffle(places)
    return list(islice(filter(None, (_mutant(*place) for place in places)), number))


def _mutant(root: Path, module: str, operator: Any, occurrence: int, line: int) -> Mutant | None:
    """None where the bug changes no meaning."""
    from cosmic_ray.mutating import mutate_code

    source = (root / module).read_text()
    mutated = mutate_code(source, operator, occurrence)
    if mutated is None or _meaning(mutated) in ("", _meaning(source)):
        return None
    near = dict.fromkeys((*SHARP.get(Path(module).stem, ()), *NEAR))
    return Mutant(
        f"{Path(module).name}:{line}-{type(operator).__name__}-{occurrence}", module, source, mutated, tuple(near)
    )


def _meaning(source: str) -> str:
    """The program without its annotations, which nobody evaluates here; nothing where it is none."""
    try:
        return ast.dump(_WithoutAnnotations().visit(ast.parse(source)))
    except SyntaxError:
        return ""


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)
