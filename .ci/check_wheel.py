"""Checks what pip would install: the package alone, typed, with torch as its only requirement.

python .ci/check_wheel.py dist/*.whl
"""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser
from pathlib import Path


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    strangers = [name for name in names if not name.startswith(("barlow_loss/", f"{info}/"))]
    assert not strangers, f"the wheel holds more than the package: {strangers}"
    modules = {str(path) for path in Path("barlow_loss").rglob("*.py")} | {"barlow_loss/py.typed"}
    packed = {name for name in names if name.startswith("barlow_loss/")}
    assert packed == modules, f"in the wheel or in the sources, not in both: {packed ^ modules}"
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == 1, f"expected torch as the only requirement, found {needed}"
    assert needed[0].startswith("torch>="), f"expected torch with a floor and no cap, found {needed[0]}"
    assert "<" not in needed[0], f"expected no cap, found {needed[0]}"
    extras = metadata.get_all("Provides-Extra", [])
    assert extras == ["lightning"], f"expected extras for what the wheel holds alone, found {extras}"
    assert f"{info}/licenses/LICENSE" in names, "the licence is missing"
    print(f"{wheel.name}: {len(packed)} files, requires {needed[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
