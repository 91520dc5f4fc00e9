"""Runs the suite, counts, and compares what fails for hybrids alone with the list of it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.transformers_suite.fetch import fetch

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".transformers-tests"


class Outcomes:
    """The worst outcome of each test, by its class and name."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, case, name = report.nodeid.split("::")
        if report.when == "call" or report.outcome != "passed":
            self.of[case, name] = report.outcome


def listed() -> dict[tuple[str, str], str]:
    """Family and test of every line, with the reason: `Qwen3 test_name: reason`, or `all test_name: reason`."""
    lines = (HERE / "differences.txt").read_text(encoding="utf-8").splitlines()
    entries = (line.partition(": ") for line in lines if line and not line.startswith("#"))
    return {(*entry[0].split(),): entry[2] for entry in entries}  # type: ignore[misc]


def judge(of: dict[tuple[str, str], str]) -> list[str]:
    """What is wrong: a test that only a hybrid fails and no line names, or a line whose test no hybrid fails alone."""
    known, used, wrong = listed(), set(), []
    for (case, name), outcome in sorted(of.items()):
        family = case.removeprefix("Test").removesuffix("Hybrid")
        if case.endswith("Teacher") or of.get((f"Test{family}Teacher", name)) != "passed" or outcome == "passed":
            continue
        entry = next((key for key in ((family, name), ("all", name)) if key in known), None)
        used.add(entry)
        if entry is None:
            wrong.append(f"{family} {name}: {outcome} for the hybrid, passed for the teacher")
    return wrong + [f"{' '.join(entry)}: listed, but passes" for entry in sorted(known.keys() - used)]


def main(arguments: list[str]) -> int:
    outcomes = Outcomes()
    sys.path[:0] = [str(fetch(FOLDER))]
    pytest.main([str(HERE / "cases.py"), "-q", "--tb=short", "-p", "no:cacheprovider", *arguments], plugins=[outcomes])
    for kind in ("Teacher", "Hybrid"):
        counts = Counter(outcome for (case, _), outcome in outcomes.of.items() if case.endswith(kind))
        print(f"{kind.lower()}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    if not outcomes.of:
        return 1
    wrong = [] if "-k" in arguments else judge(outcomes.of)
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
