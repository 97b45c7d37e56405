"""The tests marked `gpu`."""

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from stepfuse.scripts.gpu.process import Place, Report

ROOT = Path(__file__).parents[2]


def marked_tests(place: Place, report: Report) -> dict[str, Any]:
    """Run them; a ValueError names those that failed or were skipped."""
    import pytest

    os.chdir(ROOT)
    files = [
        str(file) for file in sorted(Path("tests").glob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    results = place.folder / "tests.xml"
    # pytest would have rewritten some modules that have been imported already.
    options = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider", f"--junitxml={results}"]
    if place.pretend:  # diffusers finds no accelerator to offload from, and there is no compiler
        options += ["-k", "not offload and not graphs"]
    code = pytest.main(["-m", "gpu", "-n", "0", *options, *files])
    cases = list(ElementTree.parse(results).iter("testcase"))
    outcomes = {case.get("name", ""): next((child.tag for child in case), "passed") for case in cases}
    messages = {
        case.get("name", ""): (child.get("message") or "")[:2000]
        for case in cases
        for child in case
        if child.tag in ("failure", "error")
    }
    report({"tests": outcomes, "messages": messages})
    wrong = [f"{name} ({outcome})" for name, outcome in outcomes.items() if outcome != "passed"]
    if wrong or code or not outcomes:
        raise ValueError(", ".join(wrong) or f"pytest ended with code {int(code)}")
    return {"tests": outcomes}
