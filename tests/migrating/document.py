"""The tables of docs/migrating.md, written from the rows: `python -m tests.migrating.document`."""

import re
from pathlib import Path

from tests.migrating import rows_torchdeq, rows_torchopt, rows_xitorch
from tests.migrating.rows import Table

PATH = Path(__file__).parent.parent.parent / "docs" / "migrating.md"
TABLES: dict[str, tuple[Table, ...]] = {
    "torchdeq": rows_torchdeq.TABLES,
    "xitorch": rows_xitorch.TABLES,
    "torchopt": rows_torchopt.TABLES,
}


def written(text: str) -> str:
    """The document with its tables as the rows have them.

    Raises:
        ValueError: it has no place, or more than one, for a table.
    """
    for table in (table for tables in TABLES.values() for table in tables):
        begin, end = f"<!-- {table.name}: written by tests/migrating/document.py -->\n", f"<!-- /{table.name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PATH.name} must have one place for {table.name}: {begin!r} and {end!r}.")
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _, t=table, b=begin, e=end: f"{b}\n{t.render()}\n{e}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PATH.write_text(written(PATH.read_text()))
