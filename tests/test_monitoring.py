"""The monitor of any loop: when it reports, to whom, what it watches; the gate; the examples of its page."""

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch

from barlow_loss import (
    BarlowTwinsLoss,
    CollapseGate,
    CollapseMonitor,
    MixedBarlowTwinsLoss,
    TrainingCollapsed,
    VICRegLoss,
    collapse_report,
    monitoring,
)

PAGE = Path(__file__).parents[1] / "docs" / "monitoring.md"


def views(count=2, n=32, d=12, seed=0):
    return torch.randn(count, n, d, generator=torch.Generator().manual_seed(seed))


def collapsed(n=32, d=12):
    return torch.ones(2, n, d)


class Log(list):
    def __call__(self, step, values):
        self.append((step, values))

    @property
    def steps(self):
        return [step for step, _ in self]


# In a loop


def test_a_report_every_k_steps_from_step_0_on():
    log, z = Log(), views()
    monitor = CollapseMonitor(every=3, log=log, lambd=0.02, eps=1e-3)
    expected = collapse_report(*z, lambd=0.02, eps=1e-3)
    found = [monitor(step, *z) for step in range(8)]
    assert found == [expected, None, None] * 2 + [expected, None]
    assert log == [(step, expected.as_dict()) for step in (0, 3, 6)]


def test_between_reports_the_views_are_not_touched():
    monitor = CollapseMonitor(every=2, log=Log())
    assert monitor(1, None, None) is None
    with pytest.raises(TypeError, match="tensor"):
        monitor(2, None, None)


def test_of_more_views_the_worst_pair_is_logged():
    log, z = Log(), views(3)
    reports = CollapseMonitor(log=log)(0, *z)
    assert reports == collapse_report(*z)
    assert log == [(0, reports[reports.worst].as_dict())]


def test_the_line_that_is_printed(capsys):
    z = views()
    z[0, :, 3] = 1.0
    report = CollapseMonitor()(200, *z)
    rank = min(report.effective_rank_1, report.effective_rank_2)
    assert capsys.readouterr().out == (
        f"step 200: loss {report.loss:.4g}, mean diagonal {report.mean_diagonal:.3f}, effective rank {rank:.1f} of 12, "
        "dead features 1\n"
    )


def test_a_gate_ends_the_run_with_its_reason():
    seen = []

    def gate(report, step):
        seen.append((report, step))
        return "enough" if step == 4 else None

    log, z = Log(), views()
    monitor = CollapseMonitor(every=2, log=log, gate=gate)
    for step in range(4):
        monitor(step, *z)
    with pytest.raises(TrainingCollapsed, match=r"^step 4: enough$"):
        monitor(4, *z)
    assert log.steps == [0, 2, 4]  # the last report is told, too
    assert seen == [(collapse_report(*z), step) for step in (0, 2, 4)]


def test_what_ends_it_may_be_anything():
    reasons = []
    monitor = CollapseMonitor(log=Log(), gate=lambda report, step: "enough", end=reasons.append)
    assert monitor(100, *views()) == collapse_report(*views())
    assert reasons == ["step 100: enough"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every": 0}, ValueError, "every ≥ 1, got 0"),
        ({"every": 2.0}, TypeError, "every to be an int, got 2.0"),
        ({"every": True}, TypeError, "every to be an int"),
        ({"log": None}, TypeError, "log to be a function, got NoneType"),
        ({"gate": 0.05}, TypeError, "gate to be a function, got float"),
        ({"end": "stop"}, TypeError, "end to be a function, got str"),
        ({"lambd": -1.0}, ValueError, "lambd"),
        ({"eps": "small"}, TypeError, "eps"),
        ({"process_group": 3}, TypeError, "process_group"),
        ({"synchronize": 1}, TypeError, "synchronize"),
    ],
)
def test_settings_are_checked_at_once(settings, error, message):
    with pytest.raises(error, match=f"^CollapseMonitor: .*{message}"):
        CollapseMonitor(**settings)


# Watching a loss


def test_a_watched_loss_reports_with_its_own_settings():
    log, loss_fn = Log(), BarlowTwinsLoss(lambd=0.1, eps=1e-2)
    z = views().requires_grad_()
    handle = CollapseMonitor(every=2, log=log, lambd=7.0).watch(loss_fn)
    alone = BarlowTwinsLoss(lambd=0.1, eps=1e-2)(*z)
    for _ in range(4):
        assert torch.equal(loss_fn(*z), alone)
    with torch.no_grad():
        for _ in range(2):
            loss_fn(*z)  # validation is no step
    loss_fn(z1=z[0], z2=z[1], return_terms=True).loss.backward()
    expected = collapse_report(*z, lambd=0.1, eps=1e-2).as_dict()
    assert log == [(0, expected), (2, expected), (4, expected)]
    handle.remove()
    for _ in range(4):
        loss_fn(*z)
    assert log.steps == [0, 2, 4]


def test_the_relatives_are_watched_too():
    log, z = Log(), views(3)
    loss_fn = VICRegLoss()
    CollapseMonitor(1, log=log, lambd=0.3).watch(loss_fn)
    loss_fn(*z)
    reports = collapse_report(*z, lambd=0.3)
    assert log.pop() == (0, reports[reports.worst].as_dict())
    loss_fn = MixedBarlowTwinsLoss(lambd=0.2)
    CollapseMonitor(1, log=log).watch(loss_fn)
    loss_fn(*z, 0.5, torch.arange(32).flip(0))
    assert log.pop() == (0, collapse_report(*z[:2], lambd=0.2).as_dict())


def test_the_step_may_come_from_the_loop_and_counts_once():
    log, steps, z = Log(), iter([0, 0, 1, 1, 2, 2, 2]), views()
    loss_fn = BarlowTwinsLoss()
    CollapseMonitor(every=2, log=log).watch(loss_fn, steps.__next__)
    for _ in range(7):
        loss_fn(*z)
    assert log.steps == [0, 2]


def test_a_watched_loss_raises_what_the_gate_says_and_its_own_errors():
    loss_fn = BarlowTwinsLoss()
    CollapseMonitor(every=1, log=Log(), gate=CollapseGate(patience=2)).watch(loss_fn)
    with pytest.raises(ValueError, match=r"^barlow_twins_loss"):
        loss_fn(torch.ones(4, 3), torch.ones(4, 2))
    loss_fn(*collapsed())
    with pytest.raises(TrainingCollapsed, match=r"^step 1: the effective rank is 0"):
        loss_fn(*collapsed())


def test_a_compiled_step_is_one_graph_and_tells_nothing():
    log, loss_fn, z = Log(), BarlowTwinsLoss(), views()
    expected = loss_fn(*z)
    CollapseMonitor(every=1, log=log).watch(loss_fn)
    compiled = torch.compile(loss_fn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*z), expected)
    assert log == []
    loss_fn(*z)
    assert log.steps == [0]


def vmapped(loss_fn, z1, z2):
    return torch.func.vmap(lambda a: loss_fn(a, z2))(z1.expand(2, -1, -1))[0]


def on_meta(loss_fn, z1, z2):
    return torch.zeros_like(loss_fn(z1.to("meta"), z2.to("meta")), device="cpu") + loss_fn(z1, z2)


def traced(loss_fn, z1, z2):
    return torch.jit.trace(loss_fn, (z1, z2), check_trace=False)(z1, z2)


def of_a_gradient(loss_fn, z1, z2):
    return torch.func.grad_and_value(lambda a: loss_fn(a, z2))(z1)[1]


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("call", [vmapped, on_meta, traced, of_a_gradient], ids=lambda call: call.__name__)
def test_where_no_value_can_be_read_the_loss_is_what_it_was(call):
    log, loss_fn, z = Log(), BarlowTwinsLoss(), views()
    expected = call(loss_fn, *z)
    CollapseMonitor(every=1, log=log).watch(loss_fn)
    torch.testing.assert_close(call(loss_fn, *z), expected)
    assert log.steps == ([0] if call is on_meta else [])  # the one call with values


def test_another_module_is_not_watched():
    with pytest.raises(TypeError, match=r"got Linear. Call monitor\(step, z1, z2\) in the loop"):
        CollapseMonitor().watch(torch.nn.Linear(2, 2))


# The gate


def mostly_dead(dead=7, d=12):
    z = views(1, d=d)[0]
    z[:, :dead] = 0.5
    return collapse_report(z, z)


def of_rank(rank, d=40, n=64):
    z = views(1, n, rank)[0] @ views(1, rank, d, seed=1)[0]
    return collapse_report(z, z)


def with_nan():
    z = views()
    z[0, 1, 2] = math.nan
    return collapse_report(*z)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (collapse_report(*views()), None),
        (collapse_report(*collapsed()), "the effective rank is 0, below 0.05 of the attainable 12"),
        (of_rank(1), "the effective rank is 1, below 0.05 of the attainable 40"),
        (of_rank(4), None),
        (mostly_dead(), "7 of 12 features are dead, more than 0.5"),
        (mostly_dead(6), None),
        (with_nan(), "the loss is not finite"),
        (collapse_report(*views(), torch.ones(32, 12)), "the effective rank is 0, below 0.05 of the attainable 12"),
    ],
)
def test_what_is_bad(report, reason):
    assert CollapseGate(patience=1)(report, 0) == reason


def test_limits_are_shares():
    assert CollapseGate(min_rank=0.5, patience=1)(of_rank(4), 0).endswith("below 0.5 of the attainable 40")
    assert CollapseGate(max_dead=0.0, patience=1)(mostly_dead(1), 0) == "1 of 12 features are dead, more than 0"
    assert CollapseGate(min_rank=0.0, max_dead=1.0, patience=1)(collapse_report(*collapsed()), 0) is None


def test_it_takes_several_bad_reports_in_a_row_after_the_first_steps():
    good, bad = collapse_report(*views()), collapse_report(*collapsed())
    gate = CollapseGate(patience=2, after=100)
    reports = [bad, bad, bad, good, bad, good, bad, bad, bad]
    found = [gate(report, 50 * number) for number, report in enumerate(reports)]
    assert [reason is not None for reason in found] == [False] * 7 + [True, True]
    assert found[7].endswith("so in 2 reports in a row")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"min_rank": 5}, ValueError, r"min_rank in \[0, 1\], got 5"),
        ({"max_dead": -0.1}, ValueError, r"max_dead in \[0, 1\], got -0.1"),
        ({"max_dead": math.nan}, ValueError, "got nan"),
        ({"min_rank": "0.1"}, TypeError, "min_rank to be a float, got str"),
        ({"patience": 0}, ValueError, "patience ≥ 1, got 0"),
        ({"patience": 1.5}, TypeError, "patience to be an int"),
        ({"after": -1}, ValueError, "after ≥ 0, got -1"),
    ],
)
def test_its_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=f"^CollapseGate: .*{message}"):
        CollapseGate(**settings)


def test_a_run_that_collapses_is_ended():
    """Views drawn together and nothing that holds them apart: soon all embeddings are one."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(10, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    log = Log()
    monitor = CollapseMonitor(every=20, log=log, gate=CollapseGate(patience=2))

    def train():
        for step in range(1000):
            x = torch.randn(64, 10)
            z1, z2 = (layer(x + torch.randn_like(x)) for _ in range(2))
            optimizer.zero_grad()
            (z1 - z2).square().sum(dim=1).mean().backward()
            optimizer.step()
            monitor(step, z1, z2)

    with pytest.raises(TrainingCollapsed, match=r"16 of 16 features are dead, more than 0.5; so in 2 reports in a row"):
        train()
    assert log[0][1]["dead_features"] == 0
    assert len(log) > 2


# The page


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_the_examples_of_the_page_run(capsys):
    torch.manual_seed(0)
    plain = [block for block in blocks() if "lightning" not in block]
    assert len(plain) >= 2
    names = {}
    for block in plain:
        exec(block, names)
    told = re.findall(r"^step (\d+): loss", capsys.readouterr().out, re.MULTILINE)
    assert told[:3] == ["0", "100", "200"]
    assert isinstance(names["monitor"], monitoring.CollapseMonitor)


# Copies, several losses, and steps


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_watched_loss_is_not_watched(copied):
    log, loss_fn = Log(), BarlowTwinsLoss()
    monitor = CollapseMonitor(every=1, log=log)
    handle = monitor.watch(loss_fn, lambda: 7)
    other = copied(torch.nn.Sequential(torch.nn.Linear(2, 2), loss_fn))[1]
    assert torch.equal(other(*views()), loss_fn(*views()))
    assert log.steps == [7]
    handle.remove()
    other(*views())
    assert log.steps == [7]


def test_of_several_losses_the_one_that_is_called_first_counts_the_steps():
    log = Log()
    monitor = CollapseMonitor(every=2, log=log)
    every, now_and_then = BarlowTwinsLoss(), BarlowTwinsLoss(lambd=0.1)
    for loss_fn in (now_and_then, every):
        monitor.watch(loss_fn)
    for step in range(5):
        every(*views())
        if step % 2:
            now_and_then(*views())
    assert log.steps == [0, 2, 4]


@pytest.mark.parametrize("step", [None, "4", 4.0, True, torch.tensor(4.0)])
def test_a_step_is_a_whole_number(step):
    monitor, loss_fn = CollapseMonitor(every=2, log=Log()), BarlowTwinsLoss()
    with pytest.raises(TypeError, match="CollapseMonitor: expected step to be an int, got"):
        monitor(step, *views())
    monitor.watch(loss_fn, lambda: step)
    with pytest.raises(TypeError, match="CollapseMonitor: expected step to be an int, got"):
        loss_fn(*views())


def test_what_tells_the_step_is_a_function():
    with pytest.raises(TypeError, match="expected step to be a function that returns it, got 5"):
        CollapseMonitor().watch(BarlowTwinsLoss(), 5)
