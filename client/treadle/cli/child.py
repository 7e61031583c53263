"""`python -m treadle.cli.child PID MODULE [ARGUMENT ...]`: runs a module, and ends with its parent.

A supervisor that is killed cannot drain its children; the kernel then sends them SIGTERM instead, on Linux.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs the module that the command line names as `__main__`."""
    _, parent, module, *arguments = sys.argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # It died before the kernel was told.
            raise SystemExit(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
