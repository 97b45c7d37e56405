"""The budget of waits is kept exactly, and its page is what its file says."""

import json
from collections import Counter

import pytest

from tests.pretended.budget import FILE, PAGE, Measured, check_budget, table


@pytest.fixture
def allowed():
    return json.loads(FILE.read_text())["now"]["product, generators on the host"]


def measured(each, once):
    return Measured(each=each, once=once, lines=Counter({("scalar", "item", "fuse/rules/product.py:1"): 3}))


def test_the_budget_itself_is_kept(allowed):
    check_budget("product, generators on the host", measured(**allowed))


@pytest.mark.parametrize(("more", "again"), [(0.25, 0), (0, 1), (1, -3)])
def test_more_waits_fail_with_the_lines(allowed, more, again):
    with pytest.raises(AssertionError, match=r"3 × scalar item fuse/rules/product\.py:1"):
        check_budget("product, generators on the host", measured(allowed["each"] + more, allowed["once"] + again))


@pytest.mark.parametrize(("fewer", "again"), [(1, 5), (0, -1)])
def test_fewer_waits_fail_until_the_budget_is_lowered(allowed, fewer, again):
    with pytest.raises(AssertionError, match=r"lower the budget: python -m tests\.pretended\.budget"):
        check_budget("product, generators on the host", measured(allowed["each"] - fewer, allowed["once"] + again))


def test_the_page_has_the_table_of_the_file():
    assert table(json.loads(FILE.read_text())) in PAGE.read_text()
