"""Ctrl-C and SIGTERM: one line and exit code 130 or 143, while a script imports and while it works."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from utils.interruptions import STOPPED, Interrupted, as_exceptions
from utils.paths import PROJECT_ROOT

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# A script of which every import takes a while.
SLOW = """
import sys
sys.path.insert(0, {root!r})
from utils.interruptions import end_at_once
end_at_once()
print("imports", flush=True)
import time
time.sleep(60)
"""
# A step that is stopped while an object is deleted, where Python drops exceptions.
IN_A_DESTRUCTOR = """
import sys
sys.path.insert(0, {root!r})
from utils.interruptions import as_exceptions, end_at_once
end_at_once()
import time
class Held:
    def __del__(self):
        print("deletes", flush=True)
        time.sleep(60)
with as_exceptions():
    held = Held()
    del held
    print("went on")
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("code", [SLOW, IN_A_DESTRUCTOR])
def test_a_process_ends_with_one_line(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(root=str(PROJECT_ROOT))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    time.sleep(0.05)  # it sleeps by now
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == SIGNALS[number]
    assert err.strip() == STOPPED
    assert "went on" not in out


@pytest.mark.parametrize("number", SIGNALS)
def test_within_a_step_it_is_an_exception(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop, as_exceptions():
        signal.raise_signal(number)
    assert stop.value.exit_code == SIGNALS[number]
    assert signal.getsignal(number) == before


def test_every_script_begins_with_it():
    folders = (".", "representations", "dpp", "data", "data/demo", "evaluation_scripts")
    texts = [file.read_text(encoding="utf-8") for folder in folders for file in (PROJECT_ROOT / folder).glob("*.py")]
    scripts = [text for text in texts if 'if __name__ == "__main__":' in text and "from steps import" in text]
    assert len(scripts) > 12
    assert all(0 < text.find("end_at_once()") < text.index("from steps import") for text in scripts)


# A script whose work is done; its interpreter takes a moment to end.
DONE = """
import sys
sys.path.insert(0, {root!r})
from utils.interruptions import ignore
ignore()
print("done", flush=True)
import atexit, time
atexit.register(time.sleep, 0.5)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_finished_script_ends_well_whatever_comes_then(number):
    process = subprocess.Popen(
        [sys.executable, "-c", DONE.format(root=str(PROJECT_ROOT))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    process.send_signal(number)
    assert process.wait(30) == 0
