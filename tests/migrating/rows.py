"""The rows of docs/migrating.md: the same thing said to a peer and to us, as code that is printed and run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        theirs: code for the peer: a whole expression, or options that are put into the table's call.
        ours: the same for us; empty where nothing is to be said.
        note: what differs, for the reader.
        check: `"same"`, values and first gradients agree; `"value"`, values do and the peer has no gradient; else the
            name of a function in `differences.py` that asserts what the note says.
        tolerance: to which values and gradients agree, absolute.
    """

    theirs: str
    ours: str
    note: str = ""
    check: str = "same"
    tolerance: float = 1e-6


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: of its place in the document.
        peer: the package, heading of the first column.
        theirs: the call that options are put into, at `{}`; `{}` alone where rows are whole expressions.
        ours: the same for us.
        defaults: options of the peer's call that are not printed, which make both precise enough to compare; a row's
            own come first.
        rows: its lines.
    """

    name: str
    peer: str
    theirs: str
    ours: str
    rows: tuple[Row, ...]
    defaults: str = ""

    @property
    def header(self) -> str:
        """What is said above the table."""
        if self.theirs == "{}":
            return ""
        ours = self.ours.replace(", {}", ", …").replace("{}", "…")
        return f"`{self.theirs.replace('{}', '…')}` becomes `{ours}`, with the options:\n\n"

    def render(self) -> str:
        """The table in Markdown."""
        lines = [f"| {self.peer} | torchimplicit | |", "|---|---|---|"]
        lines += [f"| {_code(row.theirs)} | {_code(row.ours)} | {row.note} |" for row in self.rows]
        return self.header + "\n".join(lines) + "\n"


def _code(text: str) -> str:
    assert "|" not in text
    return f"`{text}`" if text else "nothing to do"
