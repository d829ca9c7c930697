"""The table of docs/images.md is what the readers do."""

import PIL
import pytest
import torchvision
from image_table import FILES, PAGE, READERS, outcome, table, written

if not PAGE.exists():
    pytest.skip("the pages are not part of a source distribution", allow_module_level=True)
OURS = next(iter(READERS))


@pytest.mark.parametrize("name", FILES)
def test_this_program_reads_a_file_right_or_refuses_it(name: str) -> None:
    """As the page says, whatever versions there are; the one loss that is told, and what is refused, is Pillow's."""
    found = outcome(OURS, name)
    assert f"| {name} | {found} |" in written()
    known = {"PNG, colour of 16 bits": "8 bits of it", "JPEG 2000, colour of 16 bits": "refused"}
    assert found in {"right", "right with `--value-range`", known.get(name)}


def test_the_other_readers_do_what_the_page_says() -> None:
    """With the versions that it names."""
    if f"Pillow {PIL.__version__}, torchvision {torchvision.__version__.partition('+')[0]}." not in written():
        pytest.skip(
            "the table was made with other versions: python tests/examples/image_table.py --write makes it anew"
        )
    assert written() == table()
