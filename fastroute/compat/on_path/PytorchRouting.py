"""fastroute.compat's module of this name, in a process in which nothing was installed yet."""

from fastroute.compat import install

install("PytorchRouting")
