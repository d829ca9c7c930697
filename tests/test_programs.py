"""Programs that tests start: they run as python runs them, they are ended, and nothing of them is left."""

import signal
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from programs import Nursery, Program, Wrong, start, until

Start = Callable[..., Program]
WITH_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(3600)
"""
SEES = "import os, sys; print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ['WHO'], file=sys.stderr)"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery("json") as nursery:
        yield nursery


@pytest.fixture(params=["interpreter", "fork"])
def python(request: pytest.FixtureRequest, nursery: Nursery) -> Start:
    if request.param == "fork":
        return nursery.start
    return lambda arguments, folder, **variables: start([sys.executable, *arguments], folder, **variables)


def ends(pid: int) -> bool:
    """Soon; what is killed may take a moment."""

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return until(ended, f"the end of {pid}")


def test_nothing_outlives_its_block(python, tmp_path):
    """Nor does a child that has left the session."""
    with python(["-c", WITH_A_CHILD], tmp_path) as program:
        child = int(program.until(lambda: program.output, "its output"))
        assert psutil.pid_exists(child)
    assert ends(program.pid)
    assert ends(child)


def test_a_hang_is_told_and_ended(python, tmp_path):
    program = python(["-c", WITH_A_CHILD], tmp_path)
    child = program.until(lambda: program.output, "its output")
    with pytest.raises(Wrong, match=rf"not within 0.1 seconds: its end; it said {child}"):
        program.wait(0.1)
    assert ends(int(child))


def test_an_end_before_what_is_awaited_is_told(python, tmp_path):
    with (
        python(["-c", "import sys; print('out'); sys.exit('error: why')"], tmp_path) as program,
        pytest.raises(Wrong, match="ended with 1 before never: out\n\nerror: why"),
    ):
        program.until(lambda: False, "never")
    assert (program.wait(), program.told) == (1, ["error: why"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_status(number, python, tmp_path):
    """Ctrl-C too, where the tests themselves do not hear it: in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = python(["-c", "import time; print(1, flush=True); time.sleep(3600)"], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    with program:
        program.until(lambda: program.output, "its output")
        program.send(number)
        assert program.wait() == -number


@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
def test_a_fork_sees_what_a_new_interpreter_sees(kind, nursery, tmp_path):
    (tmp_path / "module.py").write_text(SEES)
    arguments = {"-c": ["-c", SEES], "-m": ["-m", "module"], "file": [tmp_path / "module.py"]}[kind]
    seen = []
    for begin, command in ((nursery.start, arguments), (start, [sys.executable, *arguments])):
        with begin([*command, "--flag", 7], tmp_path, WHO="me") as program:
            assert program.wait() == 0, program.errors
        seen.append(program.errors)
    assert seen[0] == seen[1] != ""
