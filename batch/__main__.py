"""The `restyle` command, and `python -m batch`: from the first import to the end of the process.

A cron job pays for both ends every time, so both are short: the collector does not look through what is being
imported, none of which is garbage, and the process ends without taking a thousand modules apart once more.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from batch.cli.streams import fill_closed
from batch.errors import ExitCode
from batch.system.signals import postpone


def entry() -> NoReturn:
    """Carry out the command line of this process and end it; everything is written and closed by then."""
    gc.disable()  # until `batch.cli.process` has loaded what its command needs
    postpone()  # until then, too
    fill_closed()
    try:
        from batch.cli.main import main

        code = main()
    except KeyboardInterrupt:  # so late that nobody else takes it
        sys.stderr.write("restyle: interrupted\n")
        code = ExitCode.STOPPED_EARLY
    os._exit(code)


if __name__ == "__main__":
    entry()
