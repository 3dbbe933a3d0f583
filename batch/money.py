"""What a job costs, and whether there is money left for it. Pure.

Money is float US dollars; sums are rounded to a hundredth of a cent where they are shown. What is reserved
is rounded up (whole megapixels), because how the service rounds is not published; what is settled comes from
`X-Fal-Billable-Units`, or is the reservation where the service does not say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date

from batch.fal.endpoint import APP_ID
from batch.types import AppId

__all__ = ["PRICES", "UNKNOWN_MEGAPIXELS", "Budget", "Price"]

UNKNOWN_MEGAPIXELS = 2.1
"""What an image of unknown size is taken to be: FLUX scales down to about 1440 x 1440."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one megapixel of output costs at a target, and when that was read."""

    usd_per_megapixel: float
    as_of: date

    def reservation(self, megapixels: float | None, images: int) -> float:
        """Upper bound for one job, in dollars: each image rounded up to whole megapixels."""
        each = max(1, math.ceil(UNKNOWN_MEGAPIXELS if megapixels is None else megapixels))
        return each * images * self.usd_per_megapixel

    def charge(self, units: float) -> float:
        """Dollars for what the service says it billed."""
        return units * self.usd_per_megapixel


PRICES: dict[AppId, Price] = {APP_ID: Price(0.03, date(2026, 11, 1))}
"""fal's prices by endpoint. Source: the model's page; the platform API has the current number."""


class Budget:
    """Reserve before a submit, settle after: `spent + reserved` never passes the limit."""

    def __init__(self, limit_usd: float | None, *, spent: float = 0.0, reserved: float = 0.0) -> None:
        self.limit_usd, self.spent, self.reserved = limit_usd, spent, reserved

    def fits(self, usd: float) -> bool:
        """Whether so much can be reserved now. A millionth of a dollar of float fuzz is forgiven."""
        return self.limit_usd is None or self.spent + self.reserved + usd <= self.limit_usd + 1e-6

    def reserve(self, usd: float) -> None:
        """Set aside for a submit.

        Raises:
            ValueError: it does not fit; ask `fits` first.
        """
        if not self.fits(usd):
            raise ValueError(f"${usd:.4f} does not fit: ${self.spent + self.reserved:.4f} of ${self.limit_usd} is gone")
        self.reserved += usd

    def settle(self, reserved: float, cost: float) -> None:
        """A request ended: its reservation is freed, its cost is spent (0.0 where it was not accepted)."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += cost
