"""Entry point of a worker process; see `batch.server.engines.process`."""

from __future__ import annotations

import json
import sys

from batch.server.engines.process import main

main(sys.argv[1], json.loads(sys.argv[2]))
