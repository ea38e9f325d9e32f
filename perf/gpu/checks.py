"""Run the tests in tests/gpu as tasks of the GPU check, and report what they record as rows."""

from pathlib import Path
from typing import Any

import torch

from .. import environment
from ..results import Key, Report

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"


class Rows:
    """A plugin of pytest that reports each figure a test records, and each test that fails or is skipped without one.

    A figure is a property ``metric: (unit, value, limit, what)``. The property ``key`` names the case.
    """

    def __init__(self, report: Report) -> None:
        self.report, self.tests = report, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when != "call":
            return
        self.tests += 1
        failures = self.report.failures
        figures = dict(report.user_properties)
        key = figures.pop("key", Key(report.nodeid.rpartition("::")[2]))
        for metric, (unit, value, limit, what) in figures.items():
            self.report.checked(key, metric, unit, value, limit, what)
        if report.skipped:
            self.report.skipped(key, "run", "", report.longrepr[2])
        elif report.failed and self.report.failures == failures:
            self.report.failed(key, "run", "", report.longreprtext)


def values(_device: torch.device, report: Report, select: str) -> None:
    """Run the tests that an expression of pytest's ``-k`` selects.

    Raises:
        RuntimeError: If no test has run.
    """
    try:
        import pytest
    except ImportError:
        report.skipped(Key(select), "run", "", "the values need pytest: pip install pytest")
        return
    rows = Rows(report)
    code = pytest.main([str(TESTS), "-k", select, "-p", "no:cacheprovider"], plugins=[rows])
    if not rows.tests:
        raise RuntimeError(f"no test has run: pytest returned {code}")


def versions(device: torch.device, report: Report, csv: str) -> None:
    """Record the machine beside the CSV, and fold once each way."""
    environment.note(Path(csv))
    values(device, report, "test_first")
