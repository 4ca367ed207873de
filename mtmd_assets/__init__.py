"""The Dagster code location: what runs when, on which day."""

import os

# A thread of torch's that waits for another spins, by default so long that training is many times slower where
# others use the machine. This long costs nothing on a quiet one. Read when torch is imported, which is later.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
