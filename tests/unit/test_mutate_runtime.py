"""The faults that `scripts.mutate_runtime` plants still fit the runtime; the script itself takes an hour."""

from __future__ import annotations

import pytest

from scripts.mutate_runtime import FAULTS, FIRST, ROOT, TESTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    source = (ROOT / "pruning_runtime" / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.right) == 1
    compile(source.replace(fault.right, fault.wrong), fault.file, "exec")


def test_its_tests_exist() -> None:
    assert set(FIRST.values()) <= set(TESTS)
    assert set(FIRST) <= {fault.file for fault in FAULTS}
    assert [name for name in TESTS if not (ROOT / name).is_file()] == []
