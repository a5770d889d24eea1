"""Every row of docs/migrating.md is run: the peer's code and ours have the same values and first gradients."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.migrating import differences, document
from tests.migrating.problems import NAMES, Names
from tests.migrating.rows import Row, Table

ROWS = [(peer, table, row) for peer, tables in document.TABLES.items() for table in tables for row in table.rows]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """The peers draw and make tensors in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def expression(call: str, options: str, defaults: str) -> str:
    """The call with options in it; those given override the defaults."""
    if call == "{}":
        return options
    given = set(re.findall(r"(\w+)=", options))
    parts = re.split(r", (?=\w+=)(?![^(]*\))", defaults) if defaults else []
    kept = [d for d in parts if d.partition("=")[0] not in given]
    return call.replace("{}", ", ".join([options, *kept] if options else kept))


def evaluated(code: str, names: Names) -> Any:
    torch.manual_seed(0)
    return eval(compile(code, code, "eval"), names)


def same(theirs: Any, ours: Any, names: Names, row: Row) -> None:
    their, our = pytree.tree_leaves(theirs), pytree.tree_leaves(ours)
    assert len(their) == len(our) > 0
    for one, other in zip(their, our, strict=True):
        assert one.abs().max() > 1e-12
        torch.testing.assert_close(one, other, atol=row.tolerance, rtol=0)
    if row.check == "value":
        return
    leaves = [names["W"], names["x"]]
    # No sum of squares: states that agree must get gradients that agree, entry by entry.
    sums = [
        sum((t * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in side) for side in (their, our)
    ]
    found = [torch.autograd.grad(s, leaves, allow_unused=True, retain_graph=True) for s in sums]
    assert any(g is not None and g.abs().max() > 1e-3 for g in found[0])
    for one, other in zip(*found, strict=True):
        if one is None or other is None:
            assert one is other is None
        else:
            torch.testing.assert_close(one, other, atol=10 * row.tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore")  # those of the peers
@pytest.mark.parametrize("peer, table, row", ROWS, ids=[f"{t.name}: {r.theirs}" for _, t, r in ROWS])
def test_a_row(peer: str, table: Table, row: Row) -> None:
    names = NAMES[peer]()
    theirs = expression(table.theirs, row.theirs, table.defaults)
    ours = expression(table.ours, row.ours, "").replace("batch_dims=1, )", "batch_dims=1)")
    if row.check in ("same", "value"):
        same(evaluated(theirs, names), evaluated(ours, names), names, row)
    else:
        check = getattr(differences, row.check)
        check(lambda: evaluated(theirs, names), lambda: evaluated(ours, names) if ours else None, names)


def test_every_difference_is_one_of_a_row() -> None:
    checks = {row.check for _, _, row in ROWS}
    public = {
        name for name, thing in vars(differences).items() if getattr(thing, "__module__", "") == differences.__name__
    }
    assert {name for name in public if not name.startswith("_") and name != "Run"} == checks - {"same", "value"}


def test_the_peers_have_the_names_that_the_document_says_they_have_not() -> None:
    import torchopt.diff.implicit

    assert not hasattr(torchopt.diff.implicit, "custom_fixed_point")


def test_gradients_that_differ_are_noticed() -> None:
    names = NAMES["torchdeq"]()
    exact, cut = (names["ti"].Implicit(), names["ti"].JacobianFree())
    values = [names["ti"].fixed_point(names["f"], names["z0"], batch_dims=1, adjoint=a).value for a in (exact, cut)]
    with pytest.raises(AssertionError):
        same(values[0], values[1], names, Row("", ""))
    assert isinstance(values[0], Tensor)


def test_the_document_has_the_rows() -> None:
    text = document.PATH.read_text()
    assert document.written(text) == text, "run `python -m tests.migrating.document`"
