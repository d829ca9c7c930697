"""Measure what a pretrained encoder is worth on ImageNet, or on any images in train/ and val/ with class folders.

    python examples/imagenet_evaluate.py --data DIR --weights runs/imagenet-resnet50/backbone.pt
    python examples/imagenet_evaluate.py --data DIR --weights resnet50.pth --protocols semi-1 --list-1 1percent.txt
    torchrun --nproc-per-node 8 examples/imagenet_evaluate.py --data DIR --weights FILE

linear: a linear classifier on the frozen encoder. knn: a vote of the 20 nearest training images, without training.
semi-1, semi-10: encoder and classifier fine-tuned on 1 % or 10 % of the labels; which images, SimCLR's 1percent.txt and
10percent.txt say (google-research/simclr, imagenet_subsets/). All numbers are the published ones, and flags.

Several processes share every batch and take the steps that one would take. A checkpoint is written after each epoch;
with --resume the same command begins or continues a run. The results are those of the last epoch, in ``results.json``
and, epoch by epoch, in ``metrics.jsonl``.

Source: Zbontar et al. (2021), arXiv 2103.03230, and evaluate.py of facebookresearch/barlowtwins.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from barlow_recipes import evaluation as runs
from barlow_recipes import labels
from barlow_recipes import protocols as training
from barlow_recipes.distributed import from_main
from barlow_recipes.evaluation import Result, Run
from barlow_recipes.flags import Flags, at_least
from barlow_recipes.labelled import Tree, centres, load_tree
from barlow_recipes.neighbours import NEIGHBOURS, nearest
from barlow_recipes.options import add_options, read_options
from barlow_recipes.program import exit_status, start
from barlow_recipes.protocols import Protocol
from barlow_recipes.published import LINEAR, PUBLISHED, SEMI_SUPERVISED, Recipe
from barlow_recipes.results import results_table

PERCENT = {"semi-1": 1, "semi-10": 10}
COLUMNS = {"top1": "top-1", "top5": "top-5"}
PROTOCOLS = ("linear", "knn", *PERCENT)


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(argv), runs.OUT_OF_MEMORY)


def run(argv: Sequence[str] | None) -> None:
    """Index the images, load the encoder, go through the protocols, tell."""
    started = time.perf_counter()
    flags = vars(_parser().parse_args(argv))
    wanted = [name for name in PROTOCOLS if name in flags["protocols"]]
    options, recipes = read_options(flags), {name: _recipe(name, flags) for name in wanted if name != "knn"}
    lists = {name: _list(flags, percent) for name, percent in PERCENT.items() if name in wanted}
    tree = load_tree(options.data)
    protocols = {name: _protocol(name, recipe, lists.get(name), tree) for name, recipe in recipes.items()}
    encoder = runs.find_encoder(options)
    settings = runs.settings_of(options, tree, encoder)
    settings |= {"protocols": wanted, "neighbours": flags["neighbours"]}
    for protocol in protocols.values():
        settings |= protocol.settings()
    default = Path("runs") / f"{tree.name}-evaluation"
    with runs.opened(options, encoder, tree, settings, default) as now:
        print(runs.introduction(now))
        for name, protocol in protocols.items():
            print(f"{name}: {protocol.source}")
        for name in [name for name in wanted if name not in now.results]:
            found = _nearest(now, flags["neighbours"]) if name == "knn" else training.train(now, protocols[name])
            now.finish(name, found)
        from_main(lambda: runs.write_results(now))
        print("\n" + results_table(now.results, COLUMNS, PUBLISHED), end="\n\n")
        print(f"{time.perf_counter() - started:.0f} seconds. Results: {now.out}")


def _parser() -> Flags:
    parser = Flags(__doc__ or "")
    add, positive, real = parser.add, partial(at_least, 1, int), partial(at_least, 0.0, float)
    add_options(parser, LINEAR.batch_size)
    parser.add_argument(
        "--protocols",
        nargs="+",
        choices=PROTOCOLS,
        default=PROTOCOLS,
        metavar="NAME",
        help=f"what to measure: {', '.join(PROTOCOLS)} [all]",
    )
    add("--linear-epochs", positive, "passes over all images", default=LINEAR.epochs, metavar="EPOCHS")
    rate = "in the first epoch, not scaled by the batch size"
    add("--linear-lr-classifier", real, rate, default=LINEAR.lr_classifier, metavar="LR")
    add("--linear-weight-decay", real, "of the classifier", default=LINEAR.weight_decay, metavar="DECAY")
    add("--semi-epochs", positive, "passes over the labelled images", default=SEMI_SUPERVISED.epochs, metavar="EPOCHS")
    add("--semi-lr-backbone", real, rate, default=SEMI_SUPERVISED.lr_backbone, metavar="LR")
    add("--semi-lr-classifier", real, rate, default=SEMI_SUPERVISED.lr_classifier, metavar="LR")
    add("--semi-weight-decay", real, "of both", default=SEMI_SUPERVISED.weight_decay, metavar="DECAY")
    add("--momentum", real, "of SGD", default=LINEAR.momentum)
    add("--neighbours", positive, "that vote in knn", default=NEIGHBOURS, metavar="K")
    lists = "folder with 1percent.txt and 10percent.txt [a share of each class by a fixed seed]"
    add("--lists", Path, lists, metavar="DIR")
    for percent in PERCENT.values():
        add(f"--list-{percent}", Path, f"the images of semi-{percent} [DIR/{percent}percent.txt]", metavar="FILE")
    return parser


def _recipe(name: str, flags: dict[str, Any]) -> Recipe:
    published, prefix = (LINEAR, "linear") if name == "linear" else (SEMI_SUPERVISED, "semi")
    given = {field: flags[field] for field in ("batch_size", "momentum")}
    given |= {field: flags[f"{prefix}_{field}"] for field in asdict(published) if f"{prefix}_{field}" in flags}
    return replace(published, **given)


def _list(flags: dict[str, Any], percent: int) -> tuple[str, Path] | None:
    """The list of images for this share, and the flag that it comes from."""
    if (path := flags[f"list_{percent}"]) is not None:
        return f"--list-{percent}", path
    return ("--lists", flags["lists"] / f"{percent}percent.txt") if flags["lists"] is not None else None


def _protocol(name: str, recipe: Recipe, listed: tuple[str, Path] | None, tree: Tree) -> Protocol:
    if name == "linear":
        return Protocol(name, recipe, tree.train, f"all {len(tree.train):,} images of train/")
    if listed:
        part = labels.from_list(*listed, tree.train, tree.classes)
    else:
        part = labels.stratified(PERCENT[name], tree.train, tree.classes)
    return Protocol(name, recipe, tree.train.subset(part.images), part.source)


def _nearest(now: Run, k: int) -> Result:
    tree, options, reading = now.tree, now.options, now.options.reading
    bank, queries = centres(tree.train, reading), centres(tree.validation, reading)
    measured, unreadable = nearest(now.encoder, bank, queries, len(tree.classes), options.device, options.precision, k)
    training.check_readable(measured)
    result = training.of_accuracy(measured) | {"unreadable_in_bank": unreadable, "neighbours": k}
    notes = "".join(f", {note}" for note in training.unreadable_notes(result))
    print(f"knn: top-1 {measured.top1:.2f} %, top-5 {measured.top5:.2f} % by {k} neighbours{notes}")
    return result | {"labels": f"all {len(tree.train):,} images of train/"}


if __name__ == "__main__":
    start(main)
