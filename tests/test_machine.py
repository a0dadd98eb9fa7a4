"""What is said of the machine is what can be seen of it."""

import os
import subprocess
import sys

import jax
import pytest

from ngjax.machine import available_cores, describe_machine, describe_process


def test_description():
    machine = describe_machine()
    assert machine["device"] == jax.devices()[0].device_kind
    assert machine["cores"] == available_cores() >= 1
    assert machine["processor"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes to cores")
def test_only_cores_this_process_may_use_are_counted():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from ngjax import machine as m; "
    code += "print(m.available_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_the_command_of_a_process_says_the_script_without_its_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/run.py", "--name", "two words"])
    process = describe_process()
    assert process["command"] == "run.py --name 'two words'"
    assert process["machine"] == describe_machine()
    assert process["versions"]["jax"] == jax.__version__
    assert process["date"].endswith("+00:00")
