"""Output that can't be written any more ends nothing, and is said once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SPEAKS = """
import os
from rich.console import Console
from kdjax.runtime.output import unbroken

unbroken()
for number in range(1000):
    print("plain", number, flush=True)
    Console().print("rich", number)
with open(os.environ["DONE"], "w") as file:
    file.write("done")
"""
LOST = "kdjax: standard output can't be written ({}); going on without it\n"


def run(tmp_path, **streams):
    env = os.environ | {"DONE": str(tmp_path / "done")}
    return subprocess.Popen([sys.executable, "-c", SPEAKS], env=env, text=True, **streams)


def test_a_reader_that_has_gone(tmp_path):
    """`| head -n 1`: by plain print and by rich, which would end the process."""
    speaks = run(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert speaks.stdout.readline() == "plain 0\n"
    speaks.stdout.close()
    assert speaks.stderr.read() == LOST.format("Broken pipe")
    assert speaks.wait(60) == 0
    assert (tmp_path / "done").read_text() == "done"


def test_a_full_disk(tmp_path):
    """A log on a disk without room."""
    with open("/dev/full", "w") as full:
        speaks = run(tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert speaks.stderr.read() == LOST.format("No space left on device")
    assert speaks.wait(60) == 0


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "1>/dev/full 2>/dev/full"])
def test_streams_that_are_closed_from_the_start(tmp_path, closed):
    """What is printed does not get into the next file that is opened."""
    env = os.environ | {"DONE": str(tmp_path / "done"), "CODE": SPEAKS}
    command = f'{sys.executable} -c "$CODE" {closed}'
    assert subprocess.run(["sh", "-c", command], env=env, capture_output=True).returncode == 0
    assert (tmp_path / "done").read_text() == "done"


def test_letters_that_a_locale_lacks():
    """An arrow in a table is no reason to end."""
    code = "from kdjax.runtime.output import unbroken; unbroken(); print('\\u2016')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, b"\\u2016\n")
