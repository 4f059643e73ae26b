"""Launch configurations: a frozen dataclass and a heuristic for each family, and one optional JSON table per GPU.

Standard library only, so that ``doctor`` can print a choice without importing torch. Dtypes are torch's names:
``"bfloat16"``.
"""
