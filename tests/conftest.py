"""Settings of the whole test run."""

import os

# Small matrices on two cores: a second thread only waits, and on a busy machine it spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")
