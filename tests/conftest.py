"""Settings of every test: one thread per rank, so that sums keep one order; width of tables."""

import os

# Tables are as wide as in a log, whatever the terminal or pytest-xdist says.
os.environ.pop("COLUMNS", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
