"""Money: `reserved + spent` never exceeds the limit, in any order of events."""

from __future__ import annotations

import math
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from batch.money import UNKNOWN_MEGAPIXELS, Budget, Price

PRICE = Price(0.03, date(2026, 11, 1))
dollars = st.floats(0, 10, allow_nan=False)


class Spending(RuleBasedStateMachine):
    """Reserve if it fits; settle in any order, at any cost up to the reservation."""

    def __init__(self):
        super().__init__()
        self.budget = Budget(5.0)
        self.open: list[float] = []
        self.paid = 0.0

    @rule(usd=dollars)
    def submit(self, usd):
        if self.budget.fits(usd):
            self.budget.reserve(usd)
            self.open.append(usd)
        else:
            with pytest.raises(ValueError, match="does not fit"):
                self.budget.reserve(usd)

    @rule(which=st.integers(0, 100), share=st.floats(0, 1))
    def end(self, which, share):
        if self.open:
            usd = self.open.pop(which % len(self.open))
            self.budget.settle(usd, usd * share)
            self.paid += usd * share

    @invariant()
    def never_above_the_limit(self):
        assert self.budget.spent + self.budget.reserved <= 5.0 + 1e-5

    @invariant()
    def nothing_is_lost(self):
        assert math.isclose(self.budget.reserved, sum(self.open), abs_tol=1e-6)
        assert math.isclose(self.budget.spent, self.paid, abs_tol=1e-6)


TestSpending = Spending.TestCase


@given(dollars, st.lists(dollars, max_size=30))
def test_a_first_reservation_goes_through_exactly_where_it_fits(limit, wishes):
    """`reserve` succeeds exactly if `fits`, even at the limit."""
    budget = Budget(limit)
    for usd in wishes:
        if budget.fits(usd):
            budget.reserve(usd)
    assert budget.spent + budget.reserved <= limit + 1e-6
    assert budget.fits(0.0)


def test_without_a_limit_everything_fits():
    """None means no budget."""
    budget = Budget(None)
    budget.reserve(1e9)
    assert budget.fits(1e9)


def test_a_budget_of_nothing_lets_only_free_jobs_through():
    """0 is a valid budget."""
    assert Budget(0.0).fits(0.0)
    assert not Budget(0.0).fits(0.01)


def test_what_earlier_sessions_spent_and_reserved_counts():
    """A resumed run does not get a new budget."""
    budget = Budget(1.0, spent=0.6, reserved=0.3)
    assert budget.fits(0.1)
    assert not budget.fits(0.11)


def test_thirty_cents_ten_times_are_three_dollars():
    """Float errors do not reject the last job."""
    budget = Budget(0.3)
    for _ in range(10):
        assert budget.fits(0.03)
        budget.reserve(0.03)
        budget.settle(0.03, 0.03)
    assert not budget.fits(0.03)


@given(st.floats(0.001, 400), st.integers(1, 4))
def test_a_reservation_is_whole_megapixels_for_each_image(megapixels, images):
    """The service does not publish its rounding; rounding up is safe."""
    usd = PRICE.reservation(megapixels, images)
    assert usd >= megapixels * images * 0.03 - 1e-9
    assert usd >= images * 0.03 - 1e-9
    assert math.isclose(usd / 0.03, round(usd / 0.03), abs_tol=1e-6)


def test_an_image_of_unknown_size_counts_as_the_largest():
    """FLUX scales down to about 1440 x 1440."""
    assert PRICE.reservation(None, 1) == pytest.approx(math.ceil(UNKNOWN_MEGAPIXELS) * 0.03)


def test_the_charge_is_that_of_the_billed_units():
    """Fractions of a unit are not rounded."""
    assert PRICE.charge(0.75) == pytest.approx(0.0225)
