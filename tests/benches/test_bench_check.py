"""The gate: a ratio that is a quarter worse is named, better ones never, and nothing is skipped in silence."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import fictitious
import pytest
from fictitious import Record

import check
import measure


@pytest.fixture
def old() -> Record:
    return fictitious.results()


@pytest.fixture
def new() -> Record:
    return fictitious.results()


def compared(old: Record, new: Record, tolerance: float = 0.2) -> str:
    return check.report(old, new, check.compared(old, new), tolerance)


def verdict(old: Record, new: Record) -> str:
    return compared(old, new).splitlines()[-1]


def slower(results: Record, factor: float) -> None:
    """Ours takes so many times as long as lightly as it did, in one cell."""
    ratio = results["cells"][1]["contenders"]["lightly"]["times_ours"]
    ratio["median"] /= factor


def test_the_same_figures_pass(old: Record, new: Record) -> None:
    assert verdict(old, new) == f"None of {len(check.figures(old))} ratios is worse by more than 20 %."


@pytest.mark.parametrize(("factor", "status"), [(1.25, 1), (1.15, 0), (0.5, 0)])
def test_a_quarter_slower_is_named_and_a_seventh_is_not(
    old: Record, new: Record, factor: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower(new, factor)
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "new.json").write_text(json.dumps(new))
    with pytest.raises(SystemExit) as done:
        check.main([str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json")])
    assert int(done.value.code or 0) == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert (": time over lightly, 100×2000, threads 1 (" in last and last.endswith(", +25.0 %).")) == bool(status)
    assert last.startswith("None of") != bool(status)


def test_another_tolerance(old: Record, new: Record) -> None:
    slower(new, 1.15)
    assert "WORSE by more than 10 %, or a count more: time over lightly" in compared(old, new, 0.1)


def _more_memory(results: Record) -> None:
    results["cells"][0]["contenders"]["barlow_loss"]["working_bytes"] *= 1.25


def _steeper(results: Record) -> None:
    results["growth"]["features"]["contenders"]["barlow_loss"]["exponent"] += 0.161  # 4 ** 0.161 = 1.25


def _smaller(results: Record) -> None:
    results["growth"]["budget"]["contenders"]["barlow_loss"]["features"] = 640_000


def _far_from_gemms(results: Record) -> None:
    results["limits"][0]["ours_over_gemms"]["median"] *= 1.25


def _slow_at_launching(results: Record) -> None:
    for step in results["host"]["steps"]:
        step["over_reference"]["median"] *= 1.25


def _slow_together(results: Record) -> None:
    results["distributed"]["cells"][0]["contenders"]["textbook"]["times_ours"]["median"] /= 1.25


def _more_sent(results: Record) -> None:
    results["distributed"]["cells"][0]["contenders"]["barlow_loss"]["sent"]["collectives"] *= 1.25


def _larger_share(results: Record) -> None:
    results["training"][1]["shares"]["barlow_loss"] *= 1.25


@pytest.mark.parametrize(
    ("injury", "named"),
    [
        (
            _more_memory,
            [f"working memory over {what}, 100×1000, threads 1" for what in ("the inputs", "textbook")],
        ),
        (_steeper, ["exponent of time in d, N = 100"]),
        (_smaller, ["working memory over D, the largest, N = 100"]),
        (_far_from_gemms, ["time over its GEMMs alone, 100×1000, threads 1"]),
        (
            _slow_at_launching,
            [
                "host time over an empty autograd.Function, 16×32, Triton on a pretended GPU",
                "host time over textbook, 4×16, eager",
            ],
        ),
        (_slow_together, ["time over textbook, 100×1000 on 2 processes"]),
        (_more_sent, ["bytes sent over textbook, 100×1000 on 2 processes"]),
        (_larger_share, ["share of the loss, projector alone, batch 256"]),
    ],
)
def test_every_kind_of_ratio_is_watched(
    old: Record, new: Record, injury: Callable[[Record], None], named: list[str]
) -> None:
    injury(new)
    worse = [str(change.key) for change in check.compared(old, new) if change.worse_by > 0.2]
    assert sorted(worse) == sorted(named)
    assert verdict(new, old).startswith("None of")  # the way back is an improvement


def test_one_operation_more_is_named_whatever_the_tolerance(old: Record, new: Record) -> None:
    new["host"]["operations"][1]["operations"] += 1
    for ratio in (cell["contenders"]["lightly"]["times_ours"] for cell in new["cells"][:3]):
        ratio["median"] /= 1.1  # a larger part, within the tolerance
    lines = compared(old, new).splitlines()
    assert lines[2] == "| operations of a step, 64×2048, eager | 60 | 61 | — | +1.7 % |"
    assert lines[-1].endswith("or a count more: operations of a step, 64×2048, eager (60 → 61, +1.7 %).")
    assert verdict(new, old).startswith("None of")


def test_one_operation_more_fails(old: Record, new: Record, tmp_path: Path) -> None:
    new["host"]["operations"][0]["operations"] += 1
    for name, results in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit) as done:
        check.main([str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json")])
    assert done.value.code == 1


def test_older_results_know_nothing_of_the_host(old: Record, new: Record) -> None:
    del old["host"]
    assert "Measured now, but not committed: host at 4×16, eager: " in compared(old, new)
    assert verdict(old, new).startswith("None of")


def test_without_triton_the_launches_are_said_to_be_missing(old: Record, new: Record) -> None:
    del new["host"]["steps"][1]
    assert "Committed, but not measured now: host at 16×32, Triton on a pretended GPU: " in compared(old, new)


def test_an_exponent_is_judged_over_the_sizes_that_both_were_fitted_to() -> None:
    committed, now = check.Figure(1.0, span=16), check.Figure(1.1, span=4)
    assert committed.worse_by(now) == pytest.approx(4**0.1 - 1)


def test_the_worst_stands_first_and_the_table_is_short(old: Record, new: Record) -> None:
    slower(new, 1.25)
    new["limits"][0]["ours_over_gemms"]["median"] *= 1.5
    lines = compared(old, new).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:4]] == [
        "time over its GEMMs alone, 100×1000, threads 1",
        "time over lightly, 100×2000, threads 1",
    ]
    assert lines[2].endswith("| +50.0 % |")
    assert len(lines) == 2 + check.ROWS + 1


def test_what_is_missing_or_new_is_said(old: Record, new: Record) -> None:
    for cell in new["cells"]:
        cell["contenders"].pop("lightly", None)
    del new["training"]
    del new["cells"][3]
    new["limits"].append(fictitious.limit(300, 3000, 2.0, (0.006, 0.003, 0.001)))
    text = compared(old, new)
    assert "not measured now: training at projector alone, batch 256: share of the loss." in text
    assert "Committed, but not measured now: cells at 100×4000, threads 1: " in text
    for where in ("100×1000, threads 1", "100×2000, threads 1", "200×1000, threads 1"):
        assert f"Committed, but not measured now: cells at {where}: time over lightly." in text
    assert "Measured now, but not committed: limits at 300×3000, threads 1: time over its GEMMs alone." in text


def test_nothing_in_common_is_no_pass(old: Record, new: Record) -> None:
    with pytest.raises(SystemExit, match="expected the two results to have ratios of any section in common"):
        check.compared(old, {"environment": new["environment"]})


def test_differing_environments_are_said_on_one_line(old: Record, new: Record) -> None:
    assert not check.differences(old, new)
    new["environment"] |= {"cpu": "Imaginary 1", "instructions": "NEON"}
    new["environment"]["versions"]["torch"] = "10.0.0"
    said = check.differences(old, new)
    assert compared(old, new).splitlines()[0] == said
    for what in (
        "cpu Fictitious 9000 → Imaginary 1",
        "instructions AVX9 → NEON",
        "torch 9.9.9 → 10.0.0",
    ):
        assert what in said


def test_cells_of_several_thread_counts_are_told_apart(old: Record) -> None:
    old["cells"].append(fictitious.cell(100, 1000, threads=2))
    assert {key.place for key in check.figures(old) if key.section == "cells"} >= {
        "100×1000, threads 1",
        "100×1000, threads 2",
    }


@pytest.mark.parametrize("section", ["cells", "limits"])
def test_another_number_of_threads_is_no_pass(old: Record, new: Record, section: str) -> None:
    for cell in new[section]:
        cell["threads"] = 2
    with pytest.raises(SystemExit, match=rf"ratios of {section} in common"):
        check.compared(old, new)


def test_variants_of_ours_are_held_to_the_textbook(old: Record, new: Record) -> None:
    faster, slower_ = fictitious.results(), fictitious.results()
    for results, factor in ((faster, 0.5), (slower_, 1.25)):
        results["cells"][0]["contenders"]["barlow_loss, primal"]["times_ours"]["median"] *= factor
    assert verdict(old, faster).startswith("None of")
    assert "a count more: time of barlow_loss, primal over textbook" in verdict(old, slower_)


def test_the_baseline_is_the_committed_one_whatever_lies_there_now(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        settings = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        check.subprocess.run(["git", *settings, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for name in ("2001-01-01-here.json", "2001-01-02-here.json"):
        (tmp_path / name).write_text('{"committed": true}')
    git("add", ".")
    git("commit", "-m", "results")
    (tmp_path / "2001-01-02-here.json").write_text('{"committed": false}')
    (tmp_path / "2001-01-03-here.json").write_text('{"committed": false}')
    assert measure.baseline(tmp_path) == ("2001-01-02-here.json", {"committed": True})
    assert measure.newest(tmp_path, committed=True).name == "2001-01-02-here.json"
    assert measure.newest(tmp_path).name == "2001-01-03-here.json"


def test_what_is_worse_is_measured_again_and_named_only_if_it_is_again(old: Record, new: Record) -> None:
    slower(new, 1.5)
    _steeper(new)
    asked: list[list[str]] = []
    again = fictitious.results()
    slower(again, 1.3)

    def measure(sections: list[str]) -> Record:
        asked.append(sections)
        return again

    changes = check.once_more(check.compared(old, new), 0.2, measure)
    assert asked == [["cells", "growth"]]
    text = check.report(old, new, changes, 0.2)
    assert text.splitlines()[-1].endswith("time over lightly, 100×2000, threads 1 (0.0833 → 0.125, +30.0 %).")
    assert text.splitlines()[0] == "| key | committed | now | again | worse by |"
    assert text.splitlines()[2].endswith("| +30.0 % |")


def test_what_cannot_be_measured_again_stays_worse(old: Record, new: Record) -> None:
    slower(new, 1.5)
    changes = check.once_more(check.compared(old, new), 0.2, lambda sections: {"environment": old["environment"]})
    assert check.report(old, new, changes, 0.2).splitlines()[-1].startswith("WORSE")


def test_nothing_worse_is_not_measured_again(old: Record, new: Record) -> None:
    def measure(sections: list[str]) -> Record:
        raise AssertionError(sections)

    changes = check.compared(old, new)
    assert check.once_more(changes, 0.2, measure) == changes


BENCH = """
import json, sys
folder = sys.argv[sys.argv.index("--out") + 1]
json.dump({"flags": sys.argv[1:-1]}, open(f"{folder}/2001-01-01-nowhere.json", "w"))
"""


def test_measuring_is_a_run_of_the_bench_in_a_folder_of_its_own(tmp_path: Path) -> None:
    program = tmp_path / "bench.py"
    program.write_text(BENCH)
    assert check.measured([], program) == {"flags": ["--plan", "check", "--out"]}
    assert check.measured(["cells", "growth"], program)["flags"][2:-1] == ["--only", "cells", "growth"]
    program.write_text("raise SystemExit(3)")
    with pytest.raises(check.subprocess.CalledProcessError):
        check.measured([], program)


def test_the_bench_knows_what_it_is_asked_for() -> None:
    """The sections and the plan by which check.py measures are those of bench.py."""
    for module in ("matplotlib", "torchvision"):
        pytest.importorskip(module)
    import bench

    assert set(check.SECTIONS) == set(bench.SECTIONS)
    assert "check" in bench.PLANS
    assert Path(sys.modules["bench"].__file__ or "") == check.BENCH


def test_promises_are_read_off_the_results() -> None:
    ours = check.OURS
    fit = {"d": [2048, 32768], "exponent": 1.2}
    results = {
        "growth": {
            "features": {"n": 256, "contenders": {ours: fit}},
            "samples": {"contenders": {}},
            "budget": {"contenders": {}},
        },
        "limits": [{"n": 256, "d": 8192, "threads": threads, "ours_over_gemms": {"median": 1.3}} for threads in (1, 2)],
        "training": [
            {"what": "ResNet-50 and projector", "batch_size": 64, "shares": {ours: 0.04}},
            {"what": "projector alone", "batch_size": 256, "shares": {ours: 0.2}},
        ],
    }
    said = check.verdicts(results)
    assert [line.split(":")[0] for line in said] == ["NOT KEPT", "kept", "NOT KEPT"]
    assert said[0] == "NOT KEPT: exponent of time in d, N = 256: 1.2, promised at most 1.15"
    assert check.verdicts({"limits": []}) == []


def test_the_committed_results_tell_of_every_promise_and_keep_it() -> None:
    _, results = measure.baseline()
    said = check.verdicts(results)
    assert len(said) == len(check.PROMISES)
    assert all(line.startswith("kept: ") for line in said)
