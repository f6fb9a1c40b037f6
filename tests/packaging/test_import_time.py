"""Importing the package, and starting its command line, stays quick."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "datasets", "pandas", "matplotlib", "sklearn", "scipy", "pyarrow"]
PROBE = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in {heavy} if name in sys.modules]]))
"""


@pytest.mark.parametrize("module", ["deltatune", "deltatune.cli", "deltatune.recipes.ledger"])
def test_import_takes_less_than_a_second_and_loads_nothing_heavy(module: str) -> None:
    command = [sys.executable, "-c", PROBE.format(module=module, heavy=HEAVY)]
    runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 1.0
    assert [loaded for _, loaded in runs] == [[], [], []]
