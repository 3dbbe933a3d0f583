"""Entry of a worker process; see `batch.server.engines.worker`."""

from __future__ import annotations

import json
import sys

from batch.server.engines.worker import main

main(sys.argv[1], json.loads(sys.argv[2]))
