#!/usr/bin/env bash
# lightning 2.6.6 beside stable-pretraining 0.1.8, torch 2.14.1, CPU: a Trainer of a program that never names
# stable-pretraining, with its logger, checkpoints, progress bar and summary turned off.
#
# Guess: the Trainer has no callback, imports nothing more, and logs what the module logs: nothing here.
# Seen: lightning calls what is registered as lightning.pytorch.callbacks_factory, and stable-pretraining registers there.
# So the Trainer has fourteen of its callbacks, the package is imported, logged_metrics and callback_metrics hold numbers
# named hardware/… (where psutil is installed), and a list of the installed packages and the machine is written to the
# home's cache. In an environment without it there are none. Whoever compares the two packages in one environment compares
# runs of lightning that differ from those elsewhere.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 lightning==2.6.6 psutil==7.2.2
cat > "$scratch/program.py" <<'PYTHON'
import json
import sys

import torch
from lightning.pytorch import LightningModule, Trainer


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(max_epochs=1, **off)
found = {"callbacks": [type(callback).__module__.partition(".")[0] for callback in trainer.callbacks]}
trainer.fit(Model(), torch.utils.data.DataLoader(torch.zeros(4, 2), batch_size=2))
found |= {"logged": sorted(trainer.logged_metrics), "watched": sorted(trainer.callback_metrics)}
found["imported"] = "stable_pretraining" in sys.modules
json.dump(found, open(sys.argv[1], "w"))
PYTHON
cd "$scratch"
HOME="$scratch/home" "$scratch/venv/bin/python" program.py without.json 2>&1 | tail -n 2
"$scratch/venv/bin/pip" install --quiet stable-pretraining==0.1.8
HOME="$scratch/home" "$scratch/venv/bin/python" program.py with.json > log.txt 2>&1
"$scratch/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

without, beside = (json.loads(Path(f"{name}.json").read_text()) for name in ("without", "with"))
assert without == {"callbacks": [], "logged": [], "watched": [], "imported": False}, without
assert beside["callbacks"] == ["stable_pretraining"] * 14, beside
assert beside["imported"]
assert beside["logged"] == beside["watched"]
assert beside["logged"], beside
assert all(name.startswith("hardware/") for name in beside["logged"]), beside
assert list(Path("home").rglob("environment*.json"))
print("as described")
PYTHON
