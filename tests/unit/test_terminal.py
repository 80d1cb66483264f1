"""Output that nobody reads any more, signals, and what the CUDA plugin prints. No device is needed."""

import os
import pty
import signal
import subprocess
import sys

import pytest
from runs import JAXPAR, QUICKSTART, environment

from jaxpar.run.signals import Signals
from jaxpar.run.terminal import steady_output


@pytest.fixture
def printed_to(monkeypatch):
    """Makes a file descriptor this process's standard output, for one test."""

    def use(descriptor: int):
        stream = os.fdopen(descriptor, "w")
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return use


def test_a_pipe_without_a_reader_and_a_closed_terminal_are_no_error(printed_to):
    for open_pair in (os.pipe, pty.openpty):
        reader, writer = open_pair()
        stream = printed_to(writer)
        with steady_output():
            print("read", flush=True)
            assert os.read(reader, 100).strip() == b"read"
            os.close(reader)
            print("lost", flush=True)
            print("lost, and never flushed by the program")
        assert sys.stdout is stream
        stream.close()  # as the interpreter does at its end


def test_a_full_disk_is_named_once(printed_to):
    stream = printed_to(os.open("/dev/full", os.O_WRONLY))
    with steady_output():
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            print("lost", flush=True)
        print("dropped", flush=True)
    stream.close()


def test_standard_error_never_fails(monkeypatch):
    stream = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    with steady_output():
        print("lost", file=sys.stderr, flush=True)
    stream.close()


def test_output_that_is_closed_from_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with steady_output():
        assert not sys.stdout.isatty()
        print("dropped", flush=True)
    assert sys.stdout is None


def test_sighup_stops_like_sigterm_but_not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.number == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_whose_reader_has_gone_or_whose_disk_is_full():
    command = [JAXPAR, "schedule", "1f1b"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody, open("/dev/full", "w") as full:
        quiet = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
        named = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert named.returncode == 2
    assert named.stderr.startswith("error: standard output: No space left on device") and named.stderr.count("\n") == 1


def test_no_noise_of_the_cuda_plugin_without_a_gpu():
    """With a GPU, or without the plugin, there is none anyway."""
    result = subprocess.run([JAXPAR, "mesh", QUICKSTART], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
