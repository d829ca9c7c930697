"""The evaluation in two real processes in float64: the weights, losses and votes of one process."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from labelled_tree import SMALL, make_tree, spoil
from outcomes import EXAMPLES, rows
from together import Done, launch

from programs import Nursery

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

PROGRAM = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
import imagenet_evaluate as program
from barlow_recipes import probes
from barlow_recipes.distributed import is_rank_zero

class Double(torch.nn.Module):
    def forward(self, images):
        return images.double()

class InFloat64(program.Classifier):
    def __init__(self, encoder, classes, *, frozen):
        super().__init__(encoder._replace(module=torch.nn.Sequential(Double(), encoder.module)), classes, frozen=frozen)
        built.append(self.double())

def finish_and_keep(run, name):
    finish(run, name)
    if name != "knn" and is_rank_zero():
        torch.save(built[-1].state_dict(), run.out / (name + ".pt"))

built, finish = [], program.Run.finish
program.Classifier, program.Run.finish = InFloat64, finish_and_keep
probes.MOST_SIMILARITIES = 20  # two queries at a time; the parts of the bank are of 9 and 11 images
nearest = program.nearest
program.nearest = lambda encoder, *args: (encoder.module.float(), nearest(encoder, *args))[1]
sys.exit(program.main())
"""


class Both(NamedTuple):
    folder: Path
    alone: Done
    together: Done


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Both:
    """Batches of four: the last of 21 images, and the last of 5 to fine-tune on, is one image, that one rank has.

    Of both parts of the tree one image cannot be read.
    """
    folder = tmp_path_factory.mktemp("together")
    root = make_tree(folder / "flowers", train=7, validation=3)
    spoil(root / "train" / "n01" / "n01_0.JPEG")
    spoil(root / "val" / "n01" / "n01_0.JPEG")
    (folder / "10percent.txt").write_text("n01_1.JPEG\nn01_2.JPEG\nn02_4.JPEG\nn03_1.JPEG\nn03_6.JPEG\n")
    (folder / "program.py").write_text(PROGRAM)
    flags = ("--data", root, *SMALL, "--batch-size", 4, "--protocols", "linear", "knn", "semi-10", "--neighbours", 3)
    flags += ("--epochs", 3, "--lr-classifier", 0.05, "--lists", folder)
    program = folder / "program.py"
    return Both(folder, *(launch(nursery, folder, count, program, *flags, "--out", str(count)) for count in (1, 2)))


def test_two_processes_say_what_one_does(both: Both) -> None:
    folder, alone, together = both
    assert (alone.status, together.status, together.told) == (0, 0, []), together.errors

    first, last = "  published\n", "published: "
    tables = [done.output[done.output.index(first) : done.output.index(last)] for done in (alone, together)]
    assert tables[0] == tables[1]
    assert len(together.output.splitlines()) == len(alone.output.splitlines())
    assert "small-cnn, random weights: fp32 on cpu in 2 processes; results go to 2" in together.output
    files = {path.name for path in (folder / "1").iterdir()}
    assert {path.name for path in (folder / "2").iterdir()} == files
    assert "semi-10: 5 images listed in 10percent.txt" in together.output


@pytest.mark.parametrize("protocol", ["linear", "semi-10"])
def test_two_processes_learn_what_one_does(protocol: str, both: Both) -> None:
    one, two = (torch.load(both.folder / count / f"{protocol}.pt", weights_only=True) for count in ("1", "2"))
    assert one.keys() == two.keys()
    assert one["fc.weight"].dtype == torch.float64
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-12, atol=1e-12)
    epochs = [
        [row for row in rows(both.folder / count, "epoch") if row["protocol"] == protocol] for count in ("1", "2")
    ]
    assert len(epochs[0]) == len(epochs[1]) > 1
    for first, second in zip(*epochs, strict=True):
        exact = first.keys() - {"loss", "images_per_second"}
        assert {name: second[name] for name in exact} == {name: first[name] for name in exact}
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-12)


def test_two_processes_find_the_same_neighbours_and_count_once(both: Both) -> None:
    def protocols(count: str) -> dict[str, Any]:
        return json.loads((both.folder / count / "results.json").read_text())["protocols"]

    one, two = protocols("1"), protocols("2")
    assert two["knn"] == one["knn"]
    assert two["knn"]["validation_images"] == 8
    assert (two["knn"]["unreadable_in_bank"], two["knn"]["unreadable_in_validation"]) == (1, 1)
    assert (two["linear"]["unreadable_in_training"], two["linear"]["unreadable_in_validation"]) == (1, 1)
