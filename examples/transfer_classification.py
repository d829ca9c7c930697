"""Train a linear classifier on a frozen encoder, on any images in train/ and val/ (or test/) with class folders.

    python examples/transfer_classification.py --data DIR --weights runs/imagenet-resnet50/backbone.pt
    python examples/transfer_classification.py --data places205 --weights resnet50.pth --preset places205
    torchrun --nproc-per-node 8 examples/transfer_classification.py --data DIR --weights FILE

--preset takes the numbers of a published transfer, places205 or inaturalist18, or those of linear evaluation on
ImageNet; the other flags change them. Processes, checkpoints, --resume and results are as in imagenet_evaluate.py.

Source: Zbontar et al. (2021), arXiv 2103.03230, appendix C.1; Misra & van der Maaten (2020), arXiv 1912.01991.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from barlow_recipes import evaluation as runs
from barlow_recipes import protocols as training
from barlow_recipes.distributed import from_main
from barlow_recipes.errors import UsageError
from barlow_recipes.flags import Flags, at_least
from barlow_recipes.labelled import load_tree
from barlow_recipes.options import add_options, read_options
from barlow_recipes.program import exit_status, start
from barlow_recipes.protocols import Protocol
from barlow_recipes.published import INATURALIST18, LINEAR, PLACES205, PUBLISHED_TRANSFER, Recipe
from barlow_recipes.results import results_table

PRESETS = {"linear": LINEAR, "places205": PLACES205, "inaturalist18": INATURALIST18}
COLUMNS = {"top1": "top-1", "mean_per_class": "mean per class"}


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(argv), runs.OUT_OF_MEMORY)


def run(argv: Sequence[str] | None) -> None:
    """Index the images, load the encoder, train, tell."""
    started = time.perf_counter()
    flags = vars(_parser().parse_args(argv))
    recipe, options = _recipe(flags), read_options(flags)
    tree = load_tree(options.data, ("val", "test"))
    protocol = Protocol(flags["preset"], recipe, tree.train, f"all {len(tree.train):,} images of train/")
    encoder = runs.find_encoder(options)
    settings = runs.settings_of(options, tree, encoder) | protocol.settings()
    with runs.opened(options, encoder, tree, settings, Path("runs") / f"{tree.name}-transfer") as now:
        print(runs.introduction(now))
        if protocol.name not in now.results:
            now.finish(protocol.name, training.train(now, protocol))
        from_main(lambda: runs.write_results(now))
        print("\n" + results_table(now.results, COLUMNS, PUBLISHED_TRANSFER), end="\n\n")
        print(f"{time.perf_counter() - started:.0f} seconds. Results: {now.out}")


def _parser() -> Flags:
    parser = Flags(__doc__ or "")
    add, positive, real = parser.add, partial(at_least, 1, int), partial(at_least, 0.0, float)
    add_options(parser)
    add("--preset", str, f"whose numbers the other flags begin with: {', '.join(PRESETS)}", default="linear")
    add("--epochs", positive, "passes over the images [by the preset]")
    add("--lr", real, "of the first epoch; not scaled by the batch size [by the preset]")
    add("--weight-decay", real, "of weight and bias [by the preset]")
    add("--momentum", real, "of SGD [by the preset]")
    text = "epochs after which the learning rate is multiplied by 0.1; nothing: cosine to 0 [by the preset]"
    add("--milestones", positive, text, nargs="*", metavar="EPOCH")
    return parser


def _recipe(flags: dict[str, Any]) -> Recipe:
    """The preset's, with the numbers that are given in place of its own."""
    if flags["preset"] not in PRESETS:
        raise UsageError(f"--preset {flags['preset']}: expected one of {', '.join(PRESETS)}")
    names = {"lr_classifier": "lr"} | {name: name for name in ("epochs", "batch_size", "weight_decay", "momentum")}
    given = {name: flags[flag] for name, flag in names.items() if flags[flag] is not None}
    if flags["milestones"] is not None:
        given["milestones"] = tuple(sorted(flags["milestones"]))
    recipe = replace(PRESETS[flags["preset"]], **given)
    if recipe.milestones and recipe.milestones[-1] >= recipe.epochs:
        raise UsageError(
            f"--milestones {' '.join(map(str, recipe.milestones))}: expected less than --epochs {recipe.epochs}"
        )
    flags["batch_size"] = recipe.batch_size
    return recipe


if __name__ == "__main__":
    start(main)
