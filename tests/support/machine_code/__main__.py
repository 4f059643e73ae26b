"""``python -m tests.support.machine_code ARGUMENTS``: pytest with these arguments, its Triton kernels run as machine code of sm_90."""

import os
import sys

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.machine_code.plugin", *sys.argv[1:]]
    os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""})
