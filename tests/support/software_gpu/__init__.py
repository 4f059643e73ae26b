"""A GPU in software: a CUDA build of torch, Triton's own launcher and the autograd library run as they do beside a GPU, where there
is none. ``python -m tests.support.software_gpu -m pytest tests/test_gpu.py``, or any other arguments of Python's, needs a CUDA build of
torch with its Triton, a C++ compiler and CUDA's headers.

- ``runtime.cpp``, preloaded: CUDA's runtime and driver, whose device is this process's memory. Streams run at once, in program order;
  a captured graph holds what ran and does it again; what a driver refuses is refused: waits and allocations while a graph is captured,
  addresses that are no device's, side streams that never join.
- ``operators.cpp``: every operator that torch computes on CUDA is computed by the CPU's kernel on the same memory. What makes the host
  wait is known to ``torch.cuda.set_sync_debug_mode``.
- ``launches.py``: a launch of a compiled kernel decodes its parameters as the launcher packed them and runs the kernel in Triton's
  interpreter; an access outside of the device's memory is an error.
- ``csrc/cuda``, where it is built, is the emulator's (``tests/support/cuda_emulator``).

What it finds that ``pretended_gpu`` cannot, which has no CUDA tensors for C++: wrong devices anywhere, the backward on autograd's
own thread, recorded launches, streams and graphs, torch.compile on CUDA, memory that is read before it is written (fresh, it is NaN).
It shows nothing of speed, registers or races on the device, and kernels are compiled no further than Triton's GPU dialect.
"""
