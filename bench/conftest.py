"""pytest's side of the suites: options, the machine, and JSON without the raw rounds."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest

if "torch" in sys.modules and os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
    pytest.exit("torch was imported before OMP_WAIT_POLICY=PASSIVE was set: use `python -m bench run`", returncode=4)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench.harness import FAULTY, Options, machine

_KEPT = ("min", "max", "median", "iqr", "rounds")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-gpu", action="store_true", help="time the GPU's rows")
    parser.addoption("--bench-quick", action="store_true", help="small sizes and few rounds")
    parser.addoption("--bench-seconds", type=float, help="of a row's rounds, at most")
    parser.addoption("--bench-whole", action="store_true", help="every compiled rival, however long it takes")
    parser.addoption("--bench-uncompiled", action="store_true", help="without the rivals that torch.compile makes")


def options_of(config: pytest.Config) -> Options:
    return Options(*(config.getoption(f"--bench-{name}") for name in Options._fields))


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Options:
    return options_of(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A suite lists its rows in ``rows(options)``."""
    if "row" in metafunc.fixturenames:
        rows = metafunc.module.rows(options_of(metafunc.config))
        metafunc.parametrize("row", rows, ids=[str(row) for row in rows])


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine()


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    slim = [
        {
            "name": row["name"],
            "stats": {k: row["stats"][k] for k in _KEPT if k in row["stats"]},
            "extra_info": row["extra_info"],
        }
        for row in output_json["benchmarks"]
    ]
    slim += FAULTY
    output_json.clear()
    output_json.update(
        date=time.strftime("%Y-%m-%d"),
        machine=machine(),
        quick=config.getoption("--bench-quick"),
        benchmarks=slim,
    )
