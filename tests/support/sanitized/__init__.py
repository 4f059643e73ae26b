"""AddressSanitizer beside all that takes addresses, UndefinedBehaviorSanitizer beside the CPU's code. ``python -m
tests.support.sanitized tests/test_native_cpu.py``, or other arguments of pytest's, needs GCC with its sanitizers' libraries.

- The CPU's libraries are built with both, every instruction set as it stands.
- torch's memory is the sanitizer's: each tensor has a poisoned margin, and freed memory is known as such. Fresh memory
  is full of NaN.
- Every address that a Triton kernel's loads and stores give in the interpreter is asked for there, where its mask is set, and every
  one of csrc/cuda's in the emulator, where it is built to look for races.

A test during which a sanitizer reports anything fails with the report. What they cannot see: an address so wrong that it lies in
another tensor, and what lies inside of a view's own storage.
"""
