# SPDX-License-Identifier: Apache-2.0
"""`make mutants` finds what no test notices, and nothing else; on a package of a few lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = """\
def is_adult(age: int) -> bool:
    if age < 0:
        raise ValueError("no age")
    return age >= 18
"""
WEAK = """\
from toy import is_adult

def test_some():
    assert is_adult(30)
    assert not is_adult(7)
"""
PLAN = """\
package = "toy"
limit = 60
[[rule]]
modules = [""]
tests = ["test_toy.py"]
"""


class Ran(NamedTuple):
    status: int
    output: str

    def survivors(self) -> set[str]:
        return set(re.findall(r"^    (.* -> .*)\n    SURVIVED$", self.output, re.MULTILINE))

    def count(self, what: str) -> int:
        found = re.search(rf"(\d+) {what}", self.output)
        assert found, self.output
        return int(found.group(1))


def run(folder: Path, tests: str, *arguments: str, plan: str = PLAN, package: str = PACKAGE) -> Ran:
    (folder / "toy").mkdir(exist_ok=True)
    (folder / "toy" / "__init__.py").write_text(package)
    (folder / "test_toy.py").write_text(tests)
    (folder / "plan.toml").write_text(plan)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "mutants"),
        "--plan",
        "plan.toml",
        "--jobs",
        "2",
    ]
    ran = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # each start is quicker
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert (folder / "toy" / "__init__.py").read_text() == package
    return Ran(ran.returncode, ran.stdout + ran.stderr)


def explained(change: str, *, line: str, kind: str, reason: str) -> str:
    entry = {
        "file": "toy/__init__.py",
        "function": "is_adult",
        "line": line,
        "change": change,
        "reason": reason,
    }
    rows = "\n".join(f"{name} = {json.dumps(value)}" for name, value in entry.items())
    return f"[[{kind}]]\n{rows}\n"


def test_strong_tests_kill_all_and_what_does_not_end_is_killed(tmp_path: Path) -> None:
    package = "def rest(n: int) -> int:\n    while n > 9:\n        n -= 9\n    return n\n"
    tests = "from toy import rest\ndef test_it():\n    assert [rest(9), rest(10)] == [9, 1]\n"
    ran = run(tmp_path, tests, package=package, plan=PLAN.replace("60", "15"))
    assert "    n > 9 -> True\n    timed out\n" in ran.output
    assert ran.count("by time") == 1
    assert ran.count("mutants:") == ran.count("killed") == 6
    assert ran.survivors() == set()
    assert ran.status == 0, ran.output


def test_weak_tests_let_some_survive_which_may_be_explained(tmp_path: Path) -> None:
    ran = run(tmp_path, WEAK)
    assert ran.status == 1
    assert ran.survivors() == {
        "age >= 18 -> age > 18",
        "18 -> 19",
        "age < 0 -> age <= 0",
        "age < 0 -> False",
        "0 -> 1",
        "raise ValueError('no age') -> pass",
    }
    change, line = "age < 0 -> age <= 0", "if age < 0:"
    found = re.search(rf"^(\w{{8}})  .*\n.*\n    {re.escape(change)}$", ran.output, re.MULTILINE)
    assert found, ran.output
    for kind, reason, at, status in [
        ("equivalent", "nobody is zero years old", line, 0),
        ("equivalent", "", line, 1),
        ("equivalent", "the same change in another line is another one", "if age < 0 :", 1),
        ("unwatched", "one of few: the rate is less than 95 %", line, 1),
    ]:
        plan = PLAN + explained(change, line=at, kind=kind, reason=reason)
        ran = run(tmp_path, WEAK, "--id", found[1], plan=plan)
        assert ran.count("mutants:") == 1
        assert ran.status == status, ran.output


def test_a_seed_names_its_sample(tmp_path: Path) -> None:
    def ids(*arguments: str) -> set[str]:
        ran = run(tmp_path, WEAK, "--count", "2", *arguments)
        return set(re.findall(r"^(\w{8})  ", ran.output, re.MULTILINE))

    one = ids("--seed", "1")
    assert len(one) == 2
    assert ids("--seed", "1") == one
    assert ids("--seed", "2") != one
    assert ids("--only", "elsewhere") == set()


def test_a_module_that_no_rule_knows_ends_it_before_anything_runs(tmp_path: Path) -> None:
    plan = PLAN.replace('modules = [""]', 'modules = ["other"]')
    ran = run(tmp_path, WEAK, plan=plan)
    assert ran.status == 1
    assert ran.output == "No rule of the plan names tests for toy/__init__.py.\n"


def test_the_plan_knows_every_module_and_its_tests_are_there() -> None:
    plan = tomllib.loads((ROOT / "tests" / "project" / "mutants.toml").read_text())
    known = tuple(prefix for rule in plan["rule"] for prefix in rule["modules"])
    package = ROOT / plan["package"]
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert modules
    assert {module for module in modules if not module.startswith(known)} == set()
    tests = {test for rule in plan["rule"] for test in rule["tests"]}
    assert {test for test in tests if not (ROOT / test).exists()} == set()


def test_what_may_survive_stands_in_the_code() -> None:
    plan = tomllib.loads((ROOT / "tests" / "project" / "mutants.toml").read_text())
    explained = [*plan["equivalent"], *plan["unwatched"]]
    assert explained
    for each in explained:
        lines = (ROOT / each["file"]).read_text(encoding="utf-8").splitlines()
        assert each["line"] in {line.strip() for line in lines}, each


@pytest.mark.parametrize("tests", ["def test_broken():\n    assert False\n", "import nothing\n"])
def test_a_test_that_fails_anyway_kills_nothing(tmp_path: Path, tests: str) -> None:
    ran = run(tmp_path, tests, "--count", "1")
    assert ran.status == 1
    assert "fails without any change" in ran.output
    assert len(ran.survivors()) == 1
