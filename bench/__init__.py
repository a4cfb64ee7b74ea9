"""Benchmarks: one ``bench_<op>.py`` per op, run by ``python -m bench run``; ``harness.py`` says how they measure."""

import os

# Read when OpenMP starts, which importing torch does: spinning workers make sub-millisecond ops look a hundred
# times slower on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
