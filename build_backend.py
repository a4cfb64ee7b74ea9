"""setuptools, told to bring a torch where the environment that is installed into has none to build against.

The extension needs only headers of torch, and a library to link to; any torch from 2.11 on has them. pip builds in an
environment of its own, in which the torch beside it cannot be imported, but can be read.
"""

import importlib.util
import os
import re
import shlex
import shutil
import site
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 -- the other hooks are setuptools' own

OLDEST = (2, 11)


class NotBuilt(Exception):
    """Why the extension, or its CUDA part, cannot be built: one line."""


class NoTorch(NotBuilt):
    """There is no torch to build against, or an old one."""


def find_torch():
    """Directory, version and CUDA version (or None) of the torch that this Python imports, outside a build too."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or ()) if spec else []
    user = [site.getusersitepackages()] if sys.flags.no_user_site == 0 and sys.prefix == sys.base_prefix else []
    places += [os.path.join(folder, "torch") for folder in [*site.getsitepackages(), *user]]
    directory = next((Path(p) for p in places if os.path.isfile(os.path.join(p, "version.py"))), None)
    if directory is None:
        raise NoTorch("no torch to build against: pip install 'torch>=2.11' first")
    about = (directory / "version.py").read_text()
    version = re.search(r"^__version__\s*=\s*'([^']+)", about, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)", about, re.MULTILINE)
    version = version[1] if version else "0.0"
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
        raise NoTorch(f"torch {version} is older than 2.11: pip install --upgrade 'torch>=2.11'")
    return directory, version, cuda and cuda[1]


def words_of(variable):
    """An environment variable's words, as a shell splits them."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:  # a quotation without its end
        raise NotBuilt(f"{variable}={text}: {error}") from error


def find_cxx():
    if os.name != "posix":
        raise NotBuilt("there is none for Windows: use WSL")
    given = words_of("CXX")
    candidates = [given] if given else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise NotBuilt(f"no C++ compiler found ({', '.join(map(' '.join, candidates))}): install one, or set CXX")


def get_requires_for_build_wheel(config_settings=None):
    """A torch, where the extension could be built if there were one."""
    needs = build_meta.get_requires_for_build_wheel(config_settings)
    try:
        if os.environ.get("FASTROUTE_BUILD") != "0":
            find_cxx()
            find_torch()
    except NoTorch:
        needs.append("torch>=2.11")
    except NotBuilt:
        pass
    return needs


def get_requires_for_build_editable(config_settings=None):
    return get_requires_for_build_wheel(config_settings)
