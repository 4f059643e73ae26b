"""``python -m tests.support.sanitized ARGUMENTS``: pytest with these arguments beside the sanitizers."""

import os
import sys

from .build import build, environment

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    build()
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.sanitized.plugin", *sys.argv[1:]]
    os.execve(sys.executable, command, environment())
