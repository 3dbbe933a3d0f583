"""Whether a run adds up: journal, results, pictures and bills held against each other. Assembly.

Reads only, page by page, and takes no lock; what it has to remember lies in a temporary database (`run.scratch`). What
was found is a value (`run.books`). The bills are the target's word, everything else is ours.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import batched as _batched  # type: ignore[attr-defined]
