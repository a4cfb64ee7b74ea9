"""The page of a run: ``fastroute report RUN_DIR`` reads ``routing.jsonl`` and writes one HTML file."""

from .page import write_report
from .reading import CannotReport, Run, read_run

__all__ = ["CannotReport", "Run", "read_run", "write_report"]
