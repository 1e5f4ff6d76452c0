"""Run commands in other processes, which stop at a step until they are released."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class OtherProcess:
    """Fork a process for each command from one that has imported everything; its files are in `folder`."""

    def __init__(self, folder, **environment):
        self.folder = folder
        self.go = folder / "go"
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=env | environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, argv, step):
        """Start a command, and return when it reaches a step: ``"module.function"``."""
        self.go.unlink(missing_ok=True)
        self._server.stdin.write(json.dumps({"argv": [str(part) for part in argv], "step": step}) + "\n")
        self._server.stdin.flush()
        self.pid = int(self._server.stdout.readline())

    def end(self):
        """Release the command, and return its exit status."""
        self.go.touch()
        return int(self._server.stdout.readline())

    def kill(self):
        """Kill the command at its step."""
        os.kill(self.pid, signal.SIGKILL)
        assert int(self._server.stdout.readline()) == -signal.SIGKILL

    def close(self):
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()


def serve(folder):
    from tiny import TINY

    from peka_lite.backbones.registry import _BACKBONES
    from peka_lite.cli.main import main
    from peka_lite.reports import page as report  # noqa: F401 - imported once for all commands

    _BACKBONES["tiny"] = TINY
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            _stop_at(request["step"], folder / "go")
            null = os.open(os.devnull, os.O_WRONLY)
            output = os.fdopen(os.dup(1), "w")
            _stop_at.report = lambda text, output=output: (output.write(f"{text}\n"), output.flush())
            os.dup2(null, 1)
            os.dup2(null, 2)
            os._exit(main(request["argv"]))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _stop_at(step, go):
    owner, _, name = step.rpartition(".")
    module, _, cls = owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, cls) if cls else owner
    original = getattr(owner, name)

    def stopped(*args, **options):
        _stop_at.report(os.getpid())
        until = time.monotonic() + 60
        while not go.exists() and time.monotonic() < until:
            time.sleep(0.01)
        setattr(owner, name, original)
        return original(*args, **options)

    setattr(owner, name, stopped)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
