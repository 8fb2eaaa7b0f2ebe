"""The assignments are red as the student finds them, and green with the teacher's solution."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TASKS = ("a1", "a2", "a3", "a4", "a5", "a6", "b1", "b2")


def outcomes(**env):
    """{task: set of outcomes of its tests}, from one pytest process over all tasks."""
    command = [sys.executable, "-m", "pytest", "-m", " or ".join(TASKS), "--tb=no", "-rA", "-p", "no:cacheprovider", "tests/assignments"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*::test_([ab]\d)_", process.stdout, re.M)
    return {task: {outcome for outcome, name in found if name == task} for task in TASKS}


def test_the_stubs_are_red():
    for task, found in outcomes().items():
        if task[0] == "a":
            assert found == {"FAILED"}, f"{task}: every test fails until the stub is written (have you solved it?)"
        else:
            assert "FAILED" in found, f"{task}: the planted bug shows (have you mended it?)"


def test_the_reference_is_green():
    assert outcomes(REFERENCE="1") == dict.fromkeys(TASKS, {"PASSED"})


@pytest.mark.parametrize("task", ("b1_wrong_order", "b2_leak"))
def test_the_bug_hunts_print_the_symptom_that_they_quote(task):
    path = ROOT / "tests" / "assignments" / f"{task}.py"
    printed = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    quoted = [line.strip() for line in path.read_text().split('"""')[1].split("\n") if line.startswith("    ") and "python" not in line]
    found = printed.split("\n")[:-1]
    assert len(quoted) == len(found) >= 2

    def numbers(line):
        return [float(number) for number in re.findall(r"\d+\.\d+", line)]

    for said, shown in zip(quoted, found):
        assert re.sub(r"[\d.]+", "", said) == re.sub(r"[\d.]+", "", shown) and numbers(said) == pytest.approx(numbers(shown), abs=0.02)
