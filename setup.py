"""Build of the optional C++/CUDA extension ``fastroute._C``; the rest of the package is in pyproject.toml.

torch is located, never imported, so metadata needs no torch and a build no GPU. A build that cannot happen
(no compiler, no torch in the build environment, a compile error) leaves a working package behind, says so in
one line, and records why in ``fastroute/_build_info.json``, which ``python -m fastroute doctor`` reads.

FASTROUTE_BUILD=0          skip the extension
FASTROUTE_BUILD=require    fail instead of installing without it
FASTROUTE_SANITIZE=1       build it with AddressSanitizer and UBSan
CXX, CXXFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST    as usual
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # setuptools alone leaves it out
from build_backend import NotBuilt, find_cxx, find_torch, words_of

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # oldest libtorch the extension runs on: 2.11
PY_TARGET = "0x030A0000"  # oldest Python it runs on: 3.10
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Pythons have no abi3
CUDA_ARCHS = ("80", "90", "100", "120")  # without TORCH_CUDA_ARCH_LIST: those of them that nvcc knows
STANDARD = ["-std=c++20", "-O3"]
CXX_FLAGS = [
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
CUDA_FLAGS = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
SANITIZE = ["-fsanitize=address", "-fsanitize=undefined", "-fno-omit-frame-pointer"]
# Sanitized code runs where it was built: one instruction set of it, a third of the time to compile.
HERE_ONLY = ["-DFASTROUTE_ONE_ISA", *(["-march=native"] if platform.machine() == "x86_64" else [])]


def find_nvcc(torch_cuda):
    """nvcc and its -gencode flags."""
    if not torch_cuda:
        raise NotBuilt("this torch is a CPU build")
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=str(home / "bin")) or shutil.which("nvcc")
    if nvcc is None:
        raise NotBuilt("nvcc not found under CUDA_HOME or on PATH")
    release = re.search(r"release (\d+)\.", output([nvcc, "--version"]))
    if not release or release[1] != torch_cuda.split(".")[0]:
        raise NotBuilt(f"nvcc is not of the CUDA release of this torch, {torch_cuda}")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", "").replace(";", " ").split()
    if not archs:
        known = output([nvcc, "--list-gpu-arch"]).split()
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
        archs[-1:] = [f"{arch}+PTX" for arch in archs[-1:]]
    gencode = []
    for arch, ptx in ((arch.removesuffix("+PTX"), arch.endswith("+PTX")) for arch in archs):
        gencode += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        gencode += [f"-gencode=arch=compute_{arch},code=compute_{arch}"] if ptx else []
    return nvcc, gencode


def switch(variable, *values):
    """One of `values`, the first where the variable is not set."""
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise SystemExit(f"{variable}: expected one of {', '.join(values)}, got {value!r}")
    return value


def output(command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def compile_(command, target):
    """Run a compiler into `target`, which appears only when it is whole."""
    part = target.with_suffix(f".part{target.suffix}")
    done = subprocess.run([*command, "-o", part], cwd=ROOT, capture_output=True, text=True, errors="replace")
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines() or [f"exit status {done.returncode}"]
        telling = re.compile("error:|undefined reference|multiple definition|cannot find").search
        raise NotBuilt("compile error, " + next(filter(telling, lines), lines[-1]).strip())
    os.replace(part, target)


def build_library(jobs, linker, libraries, torch_version):
    """Compile each (source, command) of which any file that was read has changed, link if that made anything new."""
    folder = ROOT / "build" / "ext"
    folder.mkdir(parents=True, exist_ok=True)

    def key(*parts):  # other flags or another torch make other files
        return hashlib.sha256(repr([torch_version, *parts]).encode()).hexdigest()[:12]

    def is_current(target, read):
        if not (target.exists() and read.exists()):
            return False
        _, _, names = read.read_text().replace("\\\n", " ").partition(": ")
        files = [Path(name) for name in shlex.split(names)]
        return all(f.exists() and f.stat().st_mtime < target.stat().st_mtime for f in files)

    def build_object(job):
        source, command = job
        target = folder / f"{source.parent.name}-{source.name}-{key(command)}.o"
        read = target.with_suffix(".d")  # the compiler's list of the files that it read
        if not is_current(target, read):
            compile_([*command, str(source), "-MMD", "-MF", str(read)], target)
        return target

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(build_object, jobs))
    library = folder / f"_C-{key(linker, objects, libraries)}.so"
    if not library.exists() or library.stat().st_mtime <= max(o.stat().st_mtime for o in objects):
        compile_([*linker, *objects, *libraries], library)
    return library


def build_extension(info):
    """Build the extension, its CUDA part included where that is possible, and describe it in `info`."""
    cxx = find_cxx()
    info["compiler"] = (output([*cxx, "--version"]).splitlines() or cxx)[0]
    torch, version, torch_cuda = find_torch()
    info["torch"] = version
    info["sanitize"] = switch("FASTROUTE_SANITIZE", "0", "1") == "1"
    sanitize = SANITIZE if info["sanitize"] else []

    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    defines += [f"-DPy_LIMITED_API={PY_TARGET}"] if LIMITED_API else []
    includes = [ROOT / "csrc", torch / "include", sysconfig.get_path("include")]
    common = [*defines, *(f"-I{path}" for path in includes), "-c"]
    flags = [*STANDARD, *CXX_FLAGS, *words_of("CXXFLAGS")]
    flags += ["-O1", "-g1", *sanitize, *HERE_ONLY] if sanitize else []
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    cpp = sorted([*ROOT.glob("csrc/common/*.cpp"), *ROOT.glob("csrc/cpu/**/*.cpp")])
    cuda = sorted(ROOT.glob("csrc/cuda/*.cu"))
    jobs = [(source, [*cxx, *flags, *common]) for source in cpp]
    info["flags"] = flags + defines

    library = None
    if cuda:
        try:
            nvcc, gencode = find_nvcc(torch_cuda)
            nvcc = [nvcc, "-ccbin", cxx[-1]]
            nvcc_flags = [*STANDARD, *CUDA_FLAGS, *gencode]
            cuda_jobs = [(source, [*nvcc, *nvcc_flags, *common]) for source in cuda]
            linker = [*nvcc, *(f"-Xcompiler={flag}" for flag in sanitize), "-shared"]
            library = build_library(jobs + cuda_jobs, linker, [*libraries, "-ltorch_cuda"], version)
            info.update(cuda=True, cuda_flags=nvcc_flags)
        except NotBuilt as error:  # if it was a C++ file that failed, it fails again below
            info["cuda_reason"] = str(error)
    is_glibc = platform.libc_ver()[0] == "glibc" and platform.machine() in ("x86_64", "aarch64")
    older = ["-Wl,--wrap=exp,--wrap=log"] if is_glibc else []  # csrc/common/older_linux.cpp
    library = library or build_library(jobs, [*cxx, *sanitize, *shared, *older], libraries, version)
    info["built"] = True
    info["sources"] = [str(s.relative_to(ROOT)) for s in (cpp + cuda if info["cuda"] else cpp)]
    return library


class BuildExtension(build_ext):
    def run(self):
        package = ROOT / "fastroute" if self.inplace or self.editable_mode else Path(self.build_lib, "fastroute")
        package.mkdir(parents=True, exist_ok=True)
        target = package / Path(self.get_ext_filename("fastroute._C")).name
        info = {"built": False, "reason": None, "cuda": False, "cuda_reason": None}
        info["python"] = platform.python_version()
        asked = switch("FASTROUTE_BUILD", "1", "0", "require")
        try:
            if asked == "0":
                raise NotBuilt("FASTROUTE_BUILD=0")
            library = build_extension(info)
            if not target.exists() or target.read_bytes() != library.read_bytes():
                fresh = target.with_suffix(".fresh")  # a process that has the old one loaded keeps it
                shutil.copy2(library, fresh)
                os.replace(fresh, target)
        except (NotBuilt, OSError) as error:
            info["reason"] = str(error)
            target.unlink(missing_ok=True)  # an older one would not match the Python beside it
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        if not info["built"]:
            line = f"fastroute: C++ extension not built ({info['reason']})"
            if asked == "require":
                raise SystemExit(line)
            print(f"{line}; the CPU runs on the plain-PyTorch reference backend", file=sys.stderr)
        elif info["cuda_reason"] and find_torch()[2]:
            print(
                f"fastroute: CUDA kernels not built ({info['cuda_reason']}); the GPU runs on Triton",
                file=sys.stderr,
            )


kernels = ["fastroute.kernels", *(f"fastroute.kernels.{name}" for name in find_packages("kernels"))]
setup(
    license="MIT",
    packages=[*find_packages(include=["fastroute", "fastroute.*"]), "fastroute.compat.on_path", *kernels],
    package_dir={"fastroute.kernels": "kernels"},
    package_data={"fastroute": ["py.typed"]},
    ext_modules=[Extension("fastroute._C", [], py_limited_api=LIMITED_API, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
