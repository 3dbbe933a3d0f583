"""The `restyle` command, and `python -m batch`: from the first import to the end of the process.

A cron job pays for both ends every time, so both are short: the collector does not look through what is being
imported, none of which is garbage, and the process ends without taking a thousand modules apart once more.
"""

from __future__ import annotations

import gc
import os
import signal
from typing import NoReturn

gc.disable()  # until `batch.cli` has loaded what its command needs

from batch.cli import main  # noqa: E402


def entry() -> NoReturn:
    """Carry out the command line of this process and end it; everything is written and closed by then."""
    # Before and after the part of a run that collects what is in flight, a supervisor's stop is a Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    os._exit(main())


if __name__ == "__main__":
    entry()
