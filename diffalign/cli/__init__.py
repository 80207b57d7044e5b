"""The command line: the only place that prints, and the only one that sees both adapters (imported lazily)."""

import os

# A thread of torch that spins while it waits keeps the others from the core when anything else runs beside: two threads
# then take ten times as long. To sleep instead costs nothing on idle cores. It has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
