"""Prices of jobs and the budget of a run. Pure.

Amounts are float US dollars, rounded to a hundredth of a cent for display. Reservations are rounded up to whole
megapixels, because the service does not publish its rounding. The final cost comes from `X-Fal-Billable-Units`;
without this header it equals the reservation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date

from batch.fal.endpoint import APP_ID
from batch.types import AppId

__all__ = ["PRICES", "UNKNOWN_MEGAPIXELS", "Budget", "Price"]

UNKNOWN_MEGAPIXELS = 2.1
"""Assumed size of an image of unknown size: FLUX scales down to about 1440 x 1440."""


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one megapixel of output at a target, and the date on which it was read."""

    usd_per_megapixel: float
    as_of: date

    def reservation(self, megapixels: float | None, images: int) -> float:
        """Return the maximum cost of one job in dollars: each image rounded up to whole megapixels."""
        each = max(1, math.ceil(UNKNOWN_MEGAPIXELS if megapixels is None else megapixels))
        return each * images * self.usd_per_megapixel

    def charge(self, units: float) -> float:
        """Return the cost in dollars of the units that the service billed."""
        return units * self.usd_per_megapixel


PRICES: dict[AppId, Price] = {APP_ID: Price(0.03, date(2026, 11, 1))}
"""fal's prices by endpoint. Source: the model's page; the platform API has the current price."""


class Budget:
    """Money reserved before a submit and settled afterwards: `spent + reserved` never exceeds the limit."""

    def __init__(self, limit_usd: float | None, *, spent: float = 0.0, reserved: float = 0.0) -> None:
        self.limit_usd, self.spent, self.reserved = limit_usd, spent, reserved

    def fits(self, usd: float) -> bool:
        """Return whether `usd` can be reserved now, with a tolerance of $0.000001 for float errors."""
        return self.limit_usd is None or self.spent + self.reserved + usd <= self.limit_usd + 1e-6

    def reserve(self, usd: float) -> None:
        """Reserve `usd` for a submit.

        Raises:
            ValueError: it does not fit; call `fits` first.
        """
        if not self.fits(usd):
            used = self.spent + self.reserved
            raise ValueError(f"${usd:.4f} does not fit: ${used:.4f} of ${self.limit_usd} is spent or reserved")
        self.reserved += usd

    def settle(self, reserved: float, cost: float) -> None:
        """Replace the reservation of an ended request by its cost (0.0 if it was not accepted)."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += cost
