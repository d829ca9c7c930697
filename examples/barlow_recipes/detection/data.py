"""The data set of a folder, by its layout."""

from pathlib import Path

from barlow_recipes.detection.annotations import DetectionData, require_use
from barlow_recipes.detection.coco import is_coco, read_coco
from barlow_recipes.detection.voc import find_voc, read_voc
from barlow_recipes.errors import UsageError


def find_layout(root: Path) -> str:
    """Recognise the layout of a folder: "voc" or "coco".

    Raises:
        UsageError: it has neither.
    """
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    if find_voc(root):
        return "voc"
    if is_coco(root):
        return "coco"
    raise UsageError(
        f"--data {root}: expected VOC2007/ (and VOC2012/) of Pascal VOC, or annotations/, train2017/ and val2017/ of "
        "COCO"
    )


def load_data(root: Path, layout: str) -> DetectionData:
    """Read the annotations.

    Raises:
        UsageError: they cannot be used.
    """
    data = read_voc(find_voc(root) or root) if layout == "voc" else read_coco(root)
    require_use(data.train, "train on", root)
    require_use(data.test, "find in the test", root)
    return data
