"""The `restyle` command, and `python -m batch`: from the first import to the end of the process.

A cron job pays for startup and exit every time, so both are short: no garbage collection during imports, and no
interpreter shutdown, which would tear down a thousand modules.
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
    """Run the command line, then exit without interpreter shutdown: everything is written and closed."""
    gc.disable()  # until `batch.cli.process.begin`
    postpone()  # until then, too
    fill_closed()
    try:
        from batch.cli.main import main

        code = main()
    except KeyboardInterrupt:  # too late for another handler
        sys.stderr.write("restyle: interrupted\n")
        code = ExitCode.STOPPED_EARLY
    os._exit(code)


if __name__ == "__main__":
    entry()
