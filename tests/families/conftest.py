"""Collects what became of every kind, from all processes, and writes the page."""

import pytest

from tests.families.page import EXPORTED, FAILED, FOREIGN, HELD, PAGE, REFUSED, UNMADE, Row, page
from tests.families.tiny import FAMILIES

SKIPPED = {"no tiny model": UNMADE, "refused": REFUSED, "transformers": FOREIGN}
ROWS: dict[str, Row] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how far a kind came."""
    kind = report.nodeid.partition("test_family[")[2].removesuffix("]")
    if not kind or report.when != "call":
        return
    if report.skipped:
        said, _, why = report.longrepr[2].removeprefix("Skipped: ").partition(": ")
        ROWS[kind] = Row(SKIPPED[said], why)
    elif report.failed:
        ROWS[kind] = Row(FAILED, report.longrepr.reprcrash.message.partition(": ")[2])
    else:
        ROWS[kind] = Row(EXPORTED if dict(report.user_properties).get("exported") else HELD)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page, once all kinds are there."""
    if session.config.getoption("--write-families") and ROWS.keys() == set(FAMILIES):
        PAGE.write_text(page(ROWS), "utf-8")
