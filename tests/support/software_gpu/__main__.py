"""``python -m tests.support.software_gpu ARGUMENTS``: Python with these arguments beside the software GPU."""

import sys

from .build import environment

if __name__ == "__main__":
    import os

    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
