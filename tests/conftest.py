"""Two test processes share the cores: one thread each."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
