"""The assignments are red as the student finds them and with wrong solutions, green with the teacher's."""

import importlib
import re

import pytest
from conftest import ROOT, fork, fork_stage

TASKS = ("a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9", "b1", "b2", "b3")
WRONG = ("a3", "a4", "a7", "a8", "a9", "b3")  # have wrong solutions in assignments/wrong.py
HUNTS = ("b1_wrong_order", "b2_leak", "b3_random_control")


@pytest.fixture(scope="module")
def printed():
    """What six processes print: pytest on stubs, reference and wrong.py, and the bug hunts."""
    def tests(tasks, **env):
        flags = "--tb=no", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/assignments"
        return fork(lambda: pytest.main(["-m", " or ".join(tasks), *flags]), **env).stdout

    return {"stubs": tests(TASKS), "reference": tests(TASKS, REFERENCE="1"), "wrong": tests(WRONG, WRONG="1"),
            **{name: fork_stage(f"tests/assignments/{name}.py").stdout for name in HUNTS}}


def outcomes(text):
    """{task: set of outcomes of its tests}."""
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*::test_([ab]\d)_", text, re.M)
    return {task: {outcome for outcome, name in found if name == task} for task in TASKS}


def test_a_task_that_there_is_not_is_said():
    flags = "-m", "a10", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/assignments"
    assert "no such task" in fork(lambda: pytest.main(list(flags))).stdout


def test_the_stubs_are_red(printed):
    for task, found in outcomes(printed["stubs"]).items():
        if task[0] == "a":
            assert found == {"FAILED"}, f"{task}: every test fails until it is written (have you solved it?)"
        else:
            assert "FAILED" in found, f"{task}: the planted bug shows (have you mended it?)"


def test_the_reference_is_green(printed):
    assert outcomes(printed["reference"]) == dict.fromkeys(TASKS, {"PASSED"})


def test_each_wrong_solution_is_caught(printed):
    wrong = importlib.import_module("assignments.wrong")
    for task in WRONG:
        names = list(getattr(wrong, task))
        failed = re.findall(rf"^FAILED \S*::test_{task}_\w+\[(.+?)\]", printed["wrong"], re.M)
        missed = [name for name in names if not any(name in test for test in failed)]
        assert len(names) >= 3 and not missed, f"{task}: not caught: {missed}"


@pytest.mark.parametrize("name", HUNTS)
def test_the_bug_hunts_print_the_symptom_that_they_quote(name, printed):
    text = (ROOT / "tests" / "assignments" / f"{name}.py").read_text().split('"""')[1]
    quoted = [line.strip() for line in text.split("\n") if line.startswith("    ") and "python" not in line]
    found = printed[name].split("\n")[:-1]
    assert len(quoted) == len(found) >= 2

    def numbers(line):
        return [float(number) for number in re.findall(r"\d+\.\d+", line)]

    for said, shown in zip(quoted, found):
        assert re.sub(r"[\d.]+", "", said) == re.sub(r"[\d.]+", "", shown)
        assert numbers(said) == pytest.approx(numbers(shown), abs=0.02)
