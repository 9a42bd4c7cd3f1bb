"""The pinned number of tests: ``--expected-tests=check`` fails a run that differs from it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

EXPECTED = Path(__file__).with_name("expected_tests.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expected-tests",
        choices=("off", "check", "write"),
        default="off",
        help=f"compare the tests that ran with {EXPECTED.name}, or write that file anew",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--expected-tests") != "off" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(TestCensus(config), "test-census")


class TestCensus:
    """Counts tests by file, and skipped ones by file and reason, against expected_tests.json.

    A test that disappears fails the run, and so does one that is skipped (or expected to fail) for
    a reason that is not listed for its file, or more often than listed.
    """

    __test__ = False

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seen: dict[str, set[str]] = defaultdict(set)
        self.skips: dict[str, Counter[str]] = defaultdict(Counter)
        self.problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self.seen[file].add(report.nodeid)
        if report.skipped:
            self.skips[file][_skip_reason(report)] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.problems.append(f"{report.nodeid}: the whole file is skipped; skip its tests")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.config.getoption("--expected-tests") == "check":
            self._check()
        elif session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self._write()
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.problems:
            terminalreporter.section("expected tests", red=True)
            terminalreporter.line("\n".join(self.problems))
            terminalreporter.line(
                f"If that is meant: make expected-tests, and commit {EXPECTED.name}."
            )

    def _check(self) -> None:
        expected = _read()
        for file in sorted({*expected["tests"], *self.seen}):
            wanted, ran = expected["tests"].get(file, 0), len(self.seen[file])
            if wanted != ran:
                self.problems.append(f"{file}: {wanted} tests expected, {ran} run")
            allowed = expected["skips"].get(file, {})
            for reason, count in sorted(self.skips[file].items()):
                if count > allowed.get(reason, 0):
                    self.problems.append(
                        f"{file}: {count} skipped, {allowed.get(reason, 0)} allowed: {reason}"
                    )

    def _write(self) -> None:
        """Skips of other machines stay listed; those that are gone for good are removed by hand."""
        listed = _read()["skips"].items()
        skips = {file: reasons for file, reasons in listed if file in self.seen}
        for file, counts in self.skips.items():
            skips[file] = {**skips.get(file, {}), **counts}
        tests = {file: len(ids) for file, ids in self.seen.items()}
        text = json.dumps({"tests": tests, "skips": skips}, indent=2, sort_keys=True)
        EXPECTED.write_text(text + "\n")


def _read() -> dict[str, dict[str, Any]]:
    if not EXPECTED.exists():
        return {"tests": {}, "skips": {}}
    content: dict[str, dict[str, Any]] = json.loads(EXPECTED.read_text())
    return content


def _skip_reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail}"
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
