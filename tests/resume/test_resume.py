"""A run that is stopped ends with the bytes of one that nothing stopped: the short form.

    pytest tests/resume

The long form, at every change of the run's folder, is a command: see faults.py.
"""

import pytest
from resume import faults


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return faults.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unstopped(world, tmp_path_factory):
    return faults.run_through(world, tmp_path_factory.mktemp("unstopped") / "run")


@pytest.mark.parametrize(
    ("fault", "every", "kills"), [("kill", 31, 0), ("full", 53, 0), ("moment", 0, 3)]
)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(
    fault, every, kills, world, unstopped, tmp_path
):
    stops, _ = faults.stop_and_resume(fault, world, tmp_path, unstopped, every, kills)
    assert stops >= 3
