"""The assignments are red as the student finds them, and green with the teacher's solution."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TASKS, HUNTS = ("a1", "a2", "a3", "a4", "a5", "a6", "b1", "b2"), ("b1_wrong_order", "b2_leak")


@pytest.fixture(scope="module")
def printed():
    """What four processes print, side by side: pytest over all tasks on the stubs and on the reference, and the two bug hunts."""
    tests = ["-m", "pytest", "-m", " or ".join(TASKS), "--tb=no", "-rA", "-p", "no:cacheprovider", "tests/assignments"]
    commands = {"stubs": (tests, {}), "reference": (tests, {"REFERENCE": "1"})} | {name: ([f"tests/assignments/{name}.py"], {}) for name in HUNTS}
    running = {name: subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
                                      env={**os.environ, "OMP_NUM_THREADS": "1", **env}) for name, (command, env) in commands.items()}
    return {name: process.communicate(timeout=200)[0] for name, process in running.items()}


def outcomes(text):
    """{task: set of outcomes of its tests}."""
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*::test_([ab]\d)_", text, re.M)
    return {task: {outcome for outcome, name in found if name == task} for task in TASKS}


def test_the_stubs_are_red(printed):
    for task, found in outcomes(printed["stubs"]).items():
        if task[0] == "a":
            assert found == {"FAILED"}, f"{task}: every test fails until the stub is written (have you solved it?)"
        else:
            assert "FAILED" in found, f"{task}: the planted bug shows (have you mended it?)"


def test_the_reference_is_green(printed):
    assert outcomes(printed["reference"]) == dict.fromkeys(TASKS, {"PASSED"})


@pytest.mark.parametrize("name", HUNTS)
def test_the_bug_hunts_print_the_symptom_that_they_quote(name, printed):
    text = (ROOT / "tests" / "assignments" / f"{name}.py").read_text()
    quoted = [line.strip() for line in text.split('"""')[1].split("\n") if line.startswith("    ") and "python" not in line]
    found = printed[name].split("\n")[:-1]
    assert len(quoted) == len(found) >= 2

    def numbers(line):
        return [float(number) for number in re.findall(r"\d+\.\d+", line)]

    for said, shown in zip(quoted, found):
        assert re.sub(r"[\d.]+", "", said) == re.sub(r"[\d.]+", "", shown) and numbers(said) == pytest.approx(numbers(shown), abs=0.02)
