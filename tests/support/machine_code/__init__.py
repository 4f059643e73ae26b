"""Kernels in the machine code that a GPU would execute, run on the CPU: sm_90's, as Triton, nvcc and ptxas make it, thread by thread.

``python -m tests.support.machine_code tests/test_triton_lora.py`` runs a test file so: its launches are compiled instead of
interpreted, disassembled, and run on the tensors' own memory. What neither Triton's interpreter nor a reading of the binary shows is
executed: layouts in shared memory, products of warp groups and the copy engine's tiles, who waits for what, and what the compilers made
of it. Tests of ``csrc/cuda`` that take it from the emulator take it from ``binaries.py`` then, which compiles it with nvcc.

What the processor leaves open an :class:`launch.Order` decides: with ``late``, products and copies are done as late as the program
waits for them, and until then there is no number in their place; with ``ahead``, one warp goes on as far as it can before the next. Two
warps that touch a byte of shared memory without a barrier between are an error, as is an access outside of the launch's tensors.

What an opcode does others found out, and what ptxas computes with it shows (tests/test_machine_code.py); one that is not known is an
error that names it. Not there: scoreboards (a result is there for the next instruction), fences between the ways to shared memory, how
exactly a tensor core or the special unit rounds, and everything about time.
"""
