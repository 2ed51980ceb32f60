"""docs/conversion.md: its Python blocks run one after another, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/conversion.md").read_text()


def test_the_code_of_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {"__name__": "conversion_page"}
    for number, text in enumerate(blocks):
        exec(compile(text, f"docs/conversion.md, block {number}", "exec"), names)


def test_the_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]*)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
