"""What was measured, in pages of the documentation: a page has it between <!-- NAME:begin --> and <!-- NAME:end -->."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from barlow_recipes.errors import UsageError


def put_into_pages(
    results: Path, pages: list[Path], blocks: Callable[[Any], dict[str, str]], *, check: bool, command: str
) -> None:
    """Put the blocks of these results into the pages that have their marks, or see that they are there (UsageError).

    ``command`` is what puts them there.
    """
    try:
        found = blocks(json.loads(results.read_text(encoding="utf-8")))
        texts = {page: page.read_text(encoding="utf-8") for page in pages}
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{', '.join(map(str, (results, *pages)))}: cannot be read ({error})") from None
    missing = set(found)
    for page, now in texts.items():
        wanted = now
        for name, block in found.items():
            marks = f"(?s)(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
            wanted, places = re.subn(marks, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", wanted)
            missing -= {name} if places else set()
        if not check:
            page.write_text(wanted, encoding="utf-8")
        elif now != wanted:
            raise UsageError(f"{page} has not what {results} says: run {command}")
    if missing:
        marks = " and ".join(f"<!-- {name}:{mark} -->" for name in sorted(missing)[:1] for mark in ("begin", "end"))
        raise UsageError(f"{', '.join(map(str, pages))}: expected the marks {marks}, one after the other")
