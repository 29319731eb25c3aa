"""Settings of every test: one thread per rank, so that sums keep one order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
