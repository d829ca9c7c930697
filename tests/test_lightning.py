"""The callback in Lightning's own Trainer: what reaches the loggers, what stops it, what it leaves behind."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from barlow_loss import BarlowTwinsLoss, CollapseGate, TrainingCollapsed, collapse_report
from programs import start

PAGE = Path(__file__).parents[1] / "docs" / "monitoring.md"
FORWARD_HOOKS = "_forward_hooks"
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of Lightning's own, with torch 2.14


@pytest.fixture(scope="module")
def lightning():
    """Imported here, not when tests are collected: it takes seconds."""
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture(scope="module")
def pytorch_lightning():
    return pytest.importorskip("pytorch_lightning")


@pytest.fixture(autouse=True)
def without_strangers(monkeypatch):
    """Other packages may add callbacks to every Trainer, by entry points, and stable-pretraining does."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        connector = sys.modules.get(f"{package}.trainer.connectors.callback_connector")
        if connector is not None:
            monkeypatch.setattr(connector, "_load_external_callbacks", lambda group: [])


@pytest.fixture(scope="module")
def callback(lightning):
    return importlib.import_module("barlow_loss.lightning").CollapseCallback


def learner_of(package, loss_fn=None, dead_from=10**9):
    """A LightningModule as a user writes it; from one step on its embeddings are all alike."""

    class Learner(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)
            self.loss_fn = BarlowTwinsLoss(lambd=0.02) if loss_fn is None else loss_fn
            self.seen = []

        def training_step(self, batch, _):
            z1, z2 = self.layer(batch), self.layer(batch + 0.1)
            if self.global_step >= dead_from:
                z1, z2 = 0 * z1, 0 * z2
            self.seen.append((self.global_step, z1.detach(), z2.detach()))
            return self.loss_fn(z1, z2)

        def validation_step(self, batch, _):
            self.loss_fn(self.layer(batch), self.layer(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Learner()


def batches(number=12):
    return torch.utils.data.DataLoader(
        torch.randn(8 * number, 6, generator=torch.Generator().manual_seed(0)), batch_size=8
    )


def logger_of(package):
    class Logger(package.loggers.logger.Logger):
        name, version = "here", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_hyperparams(self, params, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.rows += [(step, metrics)] if any(name.startswith("collapse/") for name in metrics) else []

    return Logger()


def fit(package, learner, callback, tmp_path, **settings):
    """Train on the CPU; returns the trainer and the rows that its logger got."""
    logger = logger_of(package)
    settings = {"max_epochs": 1, "limit_val_batches": 2} | settings
    trainer = package.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=[logger],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(learner, batches(), batches())
    return trainer, logger.rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_k_steps_of_the_optimizer_a_report_reaches_the_loggers(lightning, callback, tmp_path, accumulate):
    learner = learner_of(lightning)
    _, rows = fit(lightning, learner, callback(every=2), tmp_path, accumulate_grad_batches=accumulate)
    first = {}
    for step, z1, z2 in learner.seen:
        first.setdefault(step, (z1, z2))
    expected = [
        (step, {f"collapse/{name}": value for name, value in collapse_report(*z, lambd=0.02).as_dict().items()})
        for step, z in first.items()
        if step % 2 == 0
    ]
    assert len(expected) == 12 // accumulate // 2
    assert rows == expected
    assert not getattr(learner.loss_fn, FORWARD_HOOKS)


def test_the_gate_stops_the_trainer_with_its_reason(lightning, callback, tmp_path):
    learner = learner_of(lightning, dead_from=4)
    watch = callback(every=2, gate=CollapseGate(patience=2), prefix="embeddings/")
    with pytest.warns(UserWarning, match=r"the run is stopped. step 6: the effective rank is 0, .* 2 reports in a row"):
        trainer, _ = fit(lightning, learner, watch, tmp_path)
    assert trainer.should_stop
    assert trainer.global_step == 7  # the step that was begun
    assert not getattr(learner.loss_fn, FORWARD_HOOKS)


def test_a_second_fit_goes_on_with_one_report_a_step(lightning, callback, tmp_path):
    learner, watch = learner_of(lightning), callback(every=4)
    for _ in range(2):
        _, rows = fit(lightning, learner, watch, tmp_path)
        assert [step for step, _ in rows] == [0, 4, 8]


def test_nothing_stays_after_an_error(lightning, callback, tmp_path):
    class Broken(BarlowTwinsLoss):
        def forward(self, *views, **settings):
            raise TrainingCollapsed("broken")

    learner = learner_of(lightning, loss_fn=Broken())
    with pytest.raises(TrainingCollapsed, match="broken"):
        fit(lightning, learner, callback(), tmp_path)
    assert not getattr(learner.loss_fn, FORWARD_HOOKS)


def test_a_module_without_a_loss_is_told(lightning, callback, tmp_path):
    learner = learner_of(lightning, loss_fn=torch.nn.PairwiseDistance())
    with pytest.raises(ValueError, match=r"modules of Learner, found none.*self.loss_fn = BarlowTwinsLoss\(\)"):
        fit(lightning, learner, callback(), tmp_path)


def test_settings_are_checked_at_once(callback):
    with pytest.raises(ValueError, match="every ≥ 1"):
        callback(every=0)
    with pytest.raises(TypeError, match="gate to be a function"):
        callback(gate=0.05)


def test_the_trainer_of_the_other_package_takes_it(pytorch_lightning, callback, tmp_path):
    _, rows = fit(pytorch_lightning, learner_of(pytorch_lightning), callback(every=4), tmp_path)
    assert [step for step, _ in rows] == [0, 4, 8]


TWO_PROCESSES = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors import callback_connector
from barlow_loss import BarlowTwinsLoss
from barlow_loss.lightning import CollapseCallback

callback_connector._load_external_callbacks = lambda group: []

class Learner(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.loss_fn = torch.nn.Linear(6, 5), BarlowTwinsLoss()
    def training_step(self, batch, _):
        return self.loss_fn(self.layer(batch), self.layer(batch + 0.1))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def tell(text):  # in one write: print() makes two of it under PYTHONUNBUFFERED, and the other rank's lies between
    sys.stdout.write(f"rank {trainer.global_rank}: {text}\\n")

def gate(report, step):
    tell(f"report of {report.n} samples")
    return "enough" if trainer.global_rank == 1 and step == 4 else None

trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[CollapseCallback(every=2, gate=gate)],
)
trainer.fit(Learner(), torch.utils.data.DataLoader(torch.randn(160, 6), batch_size=8))
tell(f"{trainer.global_step} steps")
torch.distributed.destroy_process_group()  # Lightning does for NCCL alone; see docs/processes.md
"""


@pytest.mark.slow
def test_two_processes_stop_in_the_same_step(lightning, tmp_path):
    """By the word of one of them; a report is about the batch of both."""
    (tmp_path / "train.py").write_text(TWO_PROCESSES, encoding="utf-8")
    with start([sys.executable, "train.py"], tmp_path) as program:
        assert program.wait() == 0, program.errors
    told = [line for line in program.output.splitlines() if line.startswith("rank")]
    for rank in (0, 1):
        reports = [f"rank {rank}: report of 16 samples"] * 3
        assert [line for line in told if line.startswith(f"rank {rank}")] == [*reports, f"rank {rank}: 5 steps"]
    assert "step 4: enough" in program.errors


def test_its_examples_run(lightning):
    failed, tried = doctest.testmod(importlib.import_module("barlow_loss.lightning"))
    assert tried > 0
    assert failed == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "lightning" in block]
    exec(block, {})


def test_without_lightning_it_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "barlow_loss.lightning", raising=False)
    with pytest.raises(ImportError, match=r"pip install lightning, or barlow_loss.CollapseMonitor"):
        importlib.import_module("barlow_loss.lightning")
