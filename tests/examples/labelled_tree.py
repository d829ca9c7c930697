"""A small tree of photographs to train and to validate on, named as in ImageNet, and flags for a small encoder."""

from pathlib import Path

import torch

COLORS = {"n01": (180, 40, 40), "n02": (40, 40, 180), "n03": (40, 180, 40)}
SMALL = (
    *("--weights", "random", "--arch", "small-cnn", "--image-size", 32),
    *("--batch-size", 8, "--workers", 0, "--device", "cpu"),
)


def make_tree(root: Path, train: int = 10, validation: int = 4, held_out: str = "val") -> Path:
    """Three classes of so many JPEG files in train/ and in val/: noise around a colour."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), (held_out, validation)):
        for name, color in COLORS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(-120, 120, (3, 40, 48), generator=generator)
                image = (torch.tensor(color).view(3, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}_{number}.JPEG", quality=90)
    return root


def spoil(path: Path) -> None:
    """Cut a file off in its middle."""
    path.write_bytes(path.read_bytes()[:200])
