"""Runner tests run on Trio with an autojumping clock: hours of a run take milliseconds."""

from __future__ import annotations

import pytest
import trio.testing


@pytest.fixture
def anyio_backend():
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}
