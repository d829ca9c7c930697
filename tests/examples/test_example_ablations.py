"""The ablations: every row trains, the objectives are what the paper writes, and the verdicts are earned."""

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import EXAMPLES
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("lightly")
import ablations
from barlow_loss import barlow_twins_loss, cross_correlation
from barlow_recipes import ablation, ablation_report, methods
from barlow_recipes.ablation import COLORED, Way, for_search, load
from barlow_recipes.ablation_report import Measured, verdict
from barlow_recipes.ablation_rows import ALIKE, BASE, GROUPS, LESS, MORE, Row, chosen, ways_of
from barlow_recipes.digits import CHANGES, augment_digits, load_digits
from barlow_recipes.methods import CRITERIA, METHODS
from barlow_recipes.metrics import read_rows
from programs import start

CONFIGURATIONS = [*dict.fromkeys(way._replace(batch_size=0) for way in ways_of(GROUPS))]


def random_views(n: int = 32, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return z, z + 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)


# The objectives


def test_the_terms_are_those_of_the_loss() -> None:
    z1, z2 = random_views()
    on, off = (CRITERIA[name](z1, z2, 0.5) for name in ("on", "off"))
    torch.testing.assert_close(on + 0.5 * off, barlow_twins_loss(z1, z2, lambd=0.5))
    torch.testing.assert_close(CRITERIA[""](z1, z2, 0.5), barlow_twins_loss(z1, z2, lambd=0.5))


def test_the_covariance_is_not_scaled() -> None:
    z1, z2 = random_views()
    joint = torch.cov(torch.cat([z1, z2], dim=1).T, correction=0)[:6, 6:]
    expected = sum((joint[i, j] - float(i == j)) ** 2 * (1 if i == j else 0.3) for i in range(6) for j in range(6))
    torch.testing.assert_close(CRITERIA["covariance"](z1, z2, 0.3), torch.as_tensor(expected))
    scaled = CRITERIA["covariance"](3 * z1, z2, 0.3)
    assert not scaled.isclose(torch.as_tensor(expected))


def test_the_features_are_normalised_in_both_directions() -> None:
    z1, _ = random_views()
    standardized = (z1 - z1.mean(dim=0)) / z1.std(dim=0, correction=0)
    rows = F.normalize(standardized, dim=1) * math.sqrt(6)
    expected = methods.of_matrix(rows.T @ rows / len(rows), 0.3)
    torch.testing.assert_close(CRITERIA["feature norm"](z1, z1, 0.3), expected, rtol=1e-4, atol=1e-6)  # ε = 1e-5
    torch.testing.assert_close((rows.T @ rows / len(rows)).trace(), torch.tensor(6.0, dtype=torch.float64))


def test_cross_entropy_is_the_papers_sum() -> None:
    z1, z2 = random_views()
    c = (cross_correlation(z1, z2) / methods.CROSS_ENTROPY_TEMPERATURE).tolist()
    on = sum(math.exp(c[i][i]) for i in range(6))
    off = sum(math.exp(max(c[i][j], 0)) for i in range(6) for j in range(6) if i != j)
    expected = -math.log(on) + 0.5 * math.log(off)
    assert float(CRITERIA["cross-entropy"](z1, z2, 0.5)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", CONFIGURATIONS, ids=str)
def test_every_row_trains(way: Way) -> None:
    """Two small steps move the encoder, and nothing becomes infinite."""
    data = load(way.data)
    found = ablation.pretrain(way._replace(batch_size=16), 1e-3, 0, data, effort=32 / ablation.IMAGES)
    torch.manual_seed(0)
    before = ablation.build_encoder(ablation.ARCHS[way.data]).module
    moved = [not a.equal(b) for a, b in zip(found.encoder.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    assert all(parameter.isfinite().all() for parameter in found.parameters())


@pytest.mark.parametrize("name", ["BYOL", "MoCo v2"])
def test_the_target_follows_slowly_and_gets_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    method = METHODS[name](nn.Linear(8, 16), 16)
    before = [parameter.clone() for parameter in method.target.parameters()]
    x1, x2 = torch.randn(2, 32, 8)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1.0)
    method(x1, x2).backward()
    assert all(parameter.grad is None for parameter in method.target.parameters())
    optimizer.step()
    method.after_step(0.0)
    online = [*nn.Sequential(method.encoder, method.head).parameters()]
    for now, old, new in zip(method.target.parameters(), before, online, strict=True):
        torch.testing.assert_close(now, methods.MOMENTUM * old + (1 - methods.MOMENTUM) * new)
    method.after_step(1.0)  # at the end it stands still
    for now, old, new in zip(method.target.parameters(), before, online, strict=True):
        torch.testing.assert_close(now, methods.MOMENTUM * old + (1 - methods.MOMENTUM) * new)


# The images


def test_the_search_sees_no_test_image() -> None:
    data = load(BASE.data)
    searched = for_search(data)
    train, held_out, test = (
        {image.numpy().tobytes() for image in part.images} for part in (searched.train, searched.test, data.test)
    )
    assert not test & (train | held_out)
    assert not train & held_out
    assert len(train | held_out) <= len(data.train.images)


def test_changes_can_be_left_out_of_the_views() -> None:
    images = load(BASE.data).train.images[:64]
    bare = augment_digits(images, torch.Generator().manual_seed(0), CHANGES)
    torch.testing.assert_close(bare, images, atol=1e-5, rtol=0)
    for change in CHANGES:
        others = [name for name in CHANGES if name != change]
        assert not augment_digits(images, torch.Generator().manual_seed(0), others).allclose(images, atol=1e-3), change


def test_colours_are_those_of_the_image_and_its_own() -> None:
    grey, colored = load(BASE.data).train.images, load(COLORED).train.images
    assert colored.shape == (len(grey), 3, 8, 8)
    tint = colored.float().amax(dim=(2, 3)) / (255 * grey.amax(dim=(2, 3)))
    assert 0.19 < tint.min() < tint.max() <= 1
    assert colored[0].ne(0).any(dim=0).eq(grey[0, 0] > 0.01).all()
    assert len(tint.unique(dim=0)) > len(tint) / 2


# The verdicts


def record(way: Way, seed: int, accuracy: float, search: bool = False) -> dict[str, Any]:
    looks = {"same": 0.7, "other": 0.1, "rank": 20.0, "seconds": 6.0}
    return {"way": way, "seed": seed, "rate": 1e-3, "search": search, "accuracy": accuracy, **looks}


@pytest.mark.parametrize(
    ("differences", "expected", "told"),
    [
        ([-1.0, -0.1, -3.0], LESS, "holds"),
        ([1.0, 0.1, 3.0], LESS, "does not hold"),
        ([1.0, 0.1, 3.0], MORE, "holds"),
        ([1.0, -0.1, 3.0], MORE, "unclear (2 of 3 seeds)"),
        ([1.0, -1.5, 3.0], ALIKE, "holds"),
        ([4.0, -1.0, 4.0], ALIKE, "does not hold"),
        ([-1.0], LESS, ""),
        ([-1.0, -2.0], "", ""),
    ],
)
def test_a_direction_holds_if_every_seed_shows_it(differences: list[float], expected: str, told: str) -> None:
    assert verdict(differences, expected) == told


def test_differences_are_paired_by_seed() -> None:
    way, other = BASE.but(depth=1), Way("SimCLR")
    values = {BASE: (90.0, 80.0), way: (89.0, 81.0), other: (70.0, 60.0)}
    records = [record(each, seed, value) for each, found in values.items() for seed, value in enumerate(found)]
    measured = Measured.of([*records, record(BASE, 2, 50.0), record(way, 0, 0.0, search=True)])
    assert measured.differences(Row("", way)) == [-1.0, 1.0]
    assert measured.differences(Row("", way, BASE, LESS, "", other, BASE)) == [-1.0 + 20.0, 1.0 + 20.0]
    assert measured.differences(Row("", BASE.but(depth=2))) == []


def study() -> dict[str, Any]:
    """As a study of one table would write it."""
    (group,) = chosen(["asymmetry"])
    ways = [BASE, *(row.way for row in group.rows)]
    records = [record(way, seed, 90.0 - 2 * place + seed) for place, way in enumerate(ways) for seed in (0, 1)]
    found = {"settings": {"only": ["asymmetry"], "seeds": 2}, "environment": {"versions": {"torch": "2.14"}}}
    return json.loads(json.dumps(found | {"chosen": [record(BASE, 100, 90.0, search=True)], "records": records}))


def test_a_table_has_ours_beside_the_papers() -> None:
    lines = ablation_report.blocks(study())["ablations-asymmetry"].splitlines()
    assert lines[2:4] == [
        "| **Barlow Twins** | 90.5 ± 0.7 |  | 71.4 |  |  |",
        "| stop-gradient | 88.5 ± 0.7 | −2.0 ± 0.0 | 70.5 | −0.9 | holds |",
    ]
    told = ablation_report.blocks(study())["ablations-how"]
    assert told.startswith("Of 3 directions of the paper 3 hold here and 0 do not; in 0 the 2 seeds disagree.")
    assert "All 8 runs took 1 minutes of one core" in told


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    found = study()
    for way in ablation_report.SHOWN.values():
        assert ablation_report.is_shown(record(way, 0, 90.0))
        assert not ablation_report.is_shown(record(way, 1, 90.0))
        found["records"].append({**json.loads(json.dumps(record(way, 0, 90.0))), "C": torch.eye(24).tolist()})
    ablation_report.draw_differences(tmp_path / "a.png", found)
    ablation_report.draw_matrices(tmp_path / "b.png", found["records"])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_the_papers_figures_are_within_what_it_reports() -> None:
    numbers = [row.paper for group in GROUPS for row in group.rows if isinstance(row.paper, float)]
    assert len(numbers) == 6 + 3 + 6
    assert all(0 < number < 76 for number in numbers)


# The program


SHORT = ("--only", "asymmetry", "--seeds", "2", "--effort", "0.002", "--processes", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablations")
    assert ablations.main([*SHORT, "--out", str(out)]) == 0
    return out


def test_an_interrupted_study_goes_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the lines of a killed run the last is cut off: it alone is run again, and gives the same."""
    lines = (finished / "runs.jsonl").read_text().splitlines()
    wanted = json.loads((finished / "results.json").read_text())
    searched = {each["rate"] for each in wanted["records"] if each["search"]}
    assert searched >= {*ablations.RATES}
    assert len([line for line in lines if line]) == len(searched) + 2 * 4
    (finished / "runs.jsonl").write_text("\n".join(lines)[:-40])
    assert ablations.main([*SHORT, "--out", str(finished)]) == 0
    assert "7 of 8 runs are in" in capsys.readouterr().out
    found = json.loads((finished / "results.json").read_text())
    for each in (*found["records"], *wanted["records"]):
        del each["seconds"]
    assert found["records"] == wanted["records"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_program_and_processes_and_keeps_what_is_done(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*SHORT[:-1], "2", "--seeds", "50", "--out", str(out)]
    with start([sys.executable, EXAMPLES / "ablations.py", *flags], tmp_path) as process:
        process.until(lambda: len(read_rows(out / "runs.jsonl")) > 5, "some runs")
        process.send(number)
        assert process.wait() == 130
    assert process.errors.splitlines()[-1] == "error: interrupted"
    assert len(read_rows(out / "runs.jsonl")) > 5
    assert not (out / "results.json").exists()


class Ideal:
    """Of a method that would be best with some rate: a log of runs that need not be made."""

    def __init__(self, rate: float) -> None:
        self.rate, self.asked = rate, []

    def complete(self, jobs: list[ablations.Job], processes: int) -> list[dict[str, Any]]:
        self.asked = [job.rate for job in jobs]
        return [record(job.way, job.seed, -abs(math.log(job.rate / self.rate))) | {"rate": job.rate} for job in jobs]


@pytest.mark.parametrize(
    ("rate", "found", "tried"),
    [(1e-3, 1e-3, 4), (4e-3, 4e-3, 5), (1.1e-2, 8e-3, 6), (3e-4, 2.5e-4, 6), (1e-9, 6.25e-5, 7), (1e9, 3.2e-2, 7)],
)
def test_the_search_goes_on_while_the_outermost_rate_is_the_best(rate: float, found: float, tried: int) -> None:
    log = Ideal(rate)
    records, best = ablations.search([BASE], log, 1.0, 1)
    assert best[BASE]["rate"] == found
    assert len(records) == len(log.asked) == tried
    assert log.asked == sorted(log.asked)


@pytest.mark.parametrize("name", ["SimCLR", "BYOL"])
def test_of_two_layers_the_head_is_the_published_one(name: str) -> None:
    published = getattr(methods.parts().modules, f"{name}ProjectionHead")(16, methods.HIDDEN, 128)
    ours = METHODS[name](nn.Linear(8, 16), 16).head
    ours.load_state_dict(published.state_dict())
    x = torch.randn(32, 16)
    assert ours(x).equal(published(x))
    assert str(ours.layers) == str(published.layers)


def test_other_settings_are_other_runs(finished: Path) -> None:
    before = (finished / "runs.jsonl").read_text()
    other = [*SHORT[:-3], "0.003", *SHORT[-2:]]
    assert ablations.main([*other, "--out", str(finished)]) == 0
    assert (finished / "runs.jsonl").read_text().startswith(before.rstrip())
    found = json.loads((finished / "results.json").read_text())
    assert {each["effort"] for each in found["records"]} == {0.003}


def test_what_has_been_measured_is_what_the_program_wrote(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    assert {each["search"] for each in found["records"]} == {True, False}
    assert all(0 <= each["accuracy"] <= 100 and each["seconds"] > 0 for each in found["records"])
    rates = {each["rate"] for each in found["records"] if not each["search"]}
    best = max((each for each in found["records"] if each["search"]), key=lambda each: each["accuracy"])
    assert rates == {best["rate"]}
    assert (finished / "tables.md").read_text().count("| stop-gradient |") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "colour"), "invalid choice 'colour' for argument '--only'"),
        (("--seeds", "0"), "--seeds 0: expected a whole number ≥ 1"),
        (("--check", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_bad_flags_are_told_in_one_line(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ablations.main([*flags, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_the_pages_have_the_tables_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert ablations.main(["--check"]) == 0


def test_leaving_nothing_out_changes_no_view() -> None:
    """The mean grey of the first views, as it was before changes could be left out."""
    first = next(iter(load_digits(4, seed=0, monitor=False).pairs.batches(0)))
    assert [float(view.double().mean()) for view in first.views] == pytest.approx([0.2451519, 0.2958303], abs=1e-5)
