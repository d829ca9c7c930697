"""The public face: the names, their signatures, their documentation, the version."""

import doctest
import importlib.metadata
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch

import barlow_loss
from barlow_loss import monitoring, reference

ROOT = Path(__file__).parents[1]
NAMES = {
    "BarlowTwinsLoss",
    "BarlowTwinsTerms",
    "CollapseGate",
    "CollapseMonitor",
    "CollapseReport",
    "DistributedBatchNorm",
    "MixedBarlowTwinsLoss",
    "MixedBarlowTwinsTerms",
    "PairReports",
    "Projector",
    "TrainingCollapsed",
    "VICRegLoss",
    "VICRegTerms",
    "barlow_twins_loss",
    "collapse_report",
    "cross_correlation",
    "mixed_barlow_twins_loss",
    "standardize",
    "vicreg_loss",
}
RESULTS = {
    "BarlowTwinsTerms",
    "CollapseReport",
    "MixedBarlowTwinsTerms",
    "PairReports",
    "TrainingCollapsed",
    "VICRegTerms",
}
ORACLES = {"barlow_twins_loss", "mixed_barlow_twins_loss", "vicreg_loss"}
# Parameter -> default of what the README and the design promise; a release may add to the end, never change these.
SIGNATURES = {
    "barlow_twins_loss": {
        "views": inspect.Parameter.empty,
        "lambd": 0.0051,
        "eps": 1e-5,
        "algorithm": "auto",
        "backend": "auto",
        "synchronize": True,
        "process_group": None,
        "grad_reduction": "mean",
        "return_terms": False,
        "pair_weights": None,
        "off_diagonal_target": 0.0,
        "correction": 0,
        "z1": None,
        "z2": None,
    },
    "BarlowTwinsLoss": {
        "lambd": 0.0051,
        "eps": 1e-5,
        "algorithm": "auto",
        "backend": "auto",
        "synchronize": True,
        "process_group": None,
        "grad_reduction": "mean",
        "pair_weights": None,
        "off_diagonal_target": 0.0,
        "correction": 0,
    },
    "vicreg_loss": {
        "views": inspect.Parameter.empty,
        "invariance": 25.0,
        "variance": 25.0,
        "covariance": 1.0,
        "eps": 1e-4,
        "algorithm": "auto",
        "synchronize": True,
        "process_group": None,
        "grad_reduction": "mean",
        "return_terms": False,
    },
    "VICRegLoss": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0, "eps": 1e-4, "algorithm": "auto"},
    "mixed_barlow_twins_loss": {
        "z1": inspect.Parameter.empty,
        "z2": inspect.Parameter.empty,
        "z_mixed": inspect.Parameter.empty,
        "alpha": inspect.Parameter.empty,
        "permutation": inspect.Parameter.empty,
        "lambd": 0.0051,
        "mix_scale": 5.0,
        "eps": 1e-5,
        "algorithm": "auto",
        "backend": "auto",
        "synchronize": True,
        "process_group": None,
        "grad_reduction": "mean",
        "return_terms": False,
    },
    "MixedBarlowTwinsLoss": {"lambd": 0.0051, "mix_scale": 5.0, "eps": 1e-5, "algorithm": "auto", "backend": "auto"},
    "Projector": {
        "in_features": inspect.Parameter.empty,
        "hidden_features": 8192,
        "out_features": 8192,
        "num_layers": 3,
        "norm_layer": torch.nn.BatchNorm1d,
    },
    "DistributedBatchNorm": {
        "num_features": inspect.Parameter.empty,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
        "process_group": None,
    },
    "standardize": {"z": inspect.Parameter.empty, "eps": 1e-5, "process_group": None},
    "cross_correlation": {"z1": inspect.Parameter.empty, "z2": inspect.Parameter.empty, "eps": 1e-5},
    "collapse_report": {"z1": inspect.Parameter.empty, "z2": inspect.Parameter.empty, "eps": 1e-5},
    "CollapseMonitor": {
        "every": 100,
        "log": monitoring.print_line,
        "gate": None,
        "end": None,
        "lambd": 0.0051,
        "eps": 1e-5,
        "process_group": None,
        "synchronize": True,
    },
    "CollapseGate": {"min_rank": 0.05, "max_dead": 0.5, "patience": 3, "after": 0},
}


def test_all_names_the_face_and_nothing_else():
    public = set(barlow_loss.__all__) - {"__version__"}
    assert public == NAMES
    assert len(barlow_loss.__all__) == len(set(barlow_loss.__all__))
    for name in NAMES:
        assert getattr(barlow_loss, name).__module__.startswith("barlow_loss")


def test_the_oracle_is_an_attribute_without_an_import():
    assert barlow_loss.reference is reference
    with pytest.raises(AttributeError, match="no attribute 'oracle'"):
        _ = barlow_loss.oracle


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(barlow_loss, name)).parameters
    defaults = {parameter.name: parameter.default for parameter in parameters.values()}
    promised = SIGNATURES[name]
    assert {key: defaults.get(key, "missing") for key in promised} == promised
    positional = [p.name for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    promised_order = [name for name in promised if name in positional]
    assert positional[: len(promised_order)] == promised_order


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_callables_are_typed(name):
    target = getattr(barlow_loss, name)
    function = target.__init__ if inspect.isclass(target) else target
    hints = getattr(function, "__annotations__", {})
    unannotated = set(inspect.signature(function).parameters) - {"self"} - set(hints)
    assert not unannotated or issubclass(target, tuple | Exception)


@pytest.mark.parametrize("name", sorted(NAMES | {f"reference.{name}" for name in ORACLES}))
def test_docstrings_have_an_example_that_runs_as_a_doctest(name):
    """pytest --doctest-modules runs them all; here each one is required to exist and to say what it takes and gives."""
    module, name = (reference, name.partition(".")[2]) if "." in name else (barlow_loss, name)
    target = getattr(module, name)
    documentation = inspect.getdoc(target)
    assert documentation
    if name in RESULTS:
        return  # Results and what is raised: shown in the examples of the functions they come from.
    examples = doctest.DocTestParser().get_examples(documentation)
    assert any(example.want for example in examples), "no example with an output"
    assert "Args:" in documentation
    if not inspect.isclass(target):
        assert "Returns:" in documentation


def test_doctests_are_collected_by_the_configured_run():
    configuration = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "--doctest-modules" in configuration
    assert re.search(r'testpaths = \[.*"barlow_loss".*\]', configuration)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("barlow_twins_loss", "BarlowTwinsTerms"),
        ("mixed_barlow_twins_loss", "MixedBarlowTwinsTerms"),
        ("vicreg_loss", "VICRegTerms"),
    ],
)
def test_return_type_follows_return_terms(name, terms):
    """A type checker knows a tensor from terms: one overload for each."""
    overloads = getattr(typing, "get_overloads", None)
    if overloads is None:
        pytest.skip("typing.get_overloads needs Python 3.11")
    found = {str(inspect.signature(f).return_annotation) for f in overloads(getattr(barlow_loss, name))}
    assert {"Tensor", terms} <= found


def test_version_is_the_same_everywhere():
    version = barlow_loss.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert re.search(
        rf"^version: ['\"]?{re.escape(version)}['\"]?$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE
    )
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    try:
        installed = importlib.metadata.version("barlow-loss")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("barlow-loss runs from a source tree, without installed metadata")
    assert installed == version


def test_package_is_marked_as_typed():
    assert (Path(barlow_loss.__file__).parent / "py.typed").is_file()
