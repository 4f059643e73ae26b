"""What a kernel may not write, because the interpreter or tl.dot's defaults would make it silently wrong (DESIGN.md,
measured facts): narrowing outside numerics.narrow, and products without a stated precision."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
HELPERS = ("narrow", "convert")  # of numerics.py: they alone may narrow
_EXACT = {"float32", "float64"} | {f"{sign}int{width}" for sign in ("", "u") for width in (8, 16, 32, 64)} | {"int1"}


def lint(source: str, path: str = "<source>") -> list[str]:
    """Complaints about the functions of ``source`` that triton compiles."""
    complaints = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in function.decorator_list):
            if not (path == "numerics.py" and function.name in HELPERS):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and (complaint := _complaint(node)):
                        complaints.append(f"{path}:{node.lineno}: {complaint}: {ast.unparse(node)}")
    return complaints


def _complaint(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("tl.dot", "tl.dot_scaled") and "input_precision" not in keywords:
        return "a product whose input_precision is not stated is formed in tf32"
    if name == "tl.store" and not _has_settled_dtype(
        keywords.get("value", call.args[1] if len(call.args) > 1 else None)
    ):
        return "a stored value must come from narrow, convert or a cast to an integer: the store itself would narrow it"
    if (name.endswith(".to") or name == "tl.cast") and not _is_bitcast(keywords):
        target = keywords.get("dtype", call.args[-1] if call.args else None)
        if target is not None and not _is_exact(target):
            return "narrowing outside numerics.narrow"
    return None


def _is_bitcast(keywords: dict[str | None, ast.expr]) -> bool:
    value = keywords.get("bitcast")
    return isinstance(value, ast.Constant) and value.value is True


def _is_exact(target: ast.expr) -> bool:
    if isinstance(target, ast.Call) and ast.unparse(target.func) == "tl.pointer_type":
        return True  # an address, not a value
    return isinstance(target, ast.Attribute) and ast.unparse(target.value) == "tl" and target.attr in _EXACT


def _has_settled_dtype(value: ast.expr | None) -> bool:
    if not isinstance(value, ast.Call):
        return False
    if isinstance(value.func, ast.Name):
        return value.func.id in HELPERS
    is_cast = isinstance(value.func, ast.Attribute) and value.func.attr == "to" and bool(value.args)
    return is_cast and "int" in ast.unparse(value.args[0]) and _is_exact(value.args[0])


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_narrow_and_multiply_by_the_helpers(path: Path) -> None:
    complaints = lint(path.read_text(), path.name)
    assert not complaints, "\n".join(complaints)


def test_there_are_kernels_to_look_at() -> None:
    assert {"lora.py", "nf4.py", "numerics.py", "philox.py"} <= {path.name for path in KERNELS.glob("*.py")}
    assert not (KERNELS / "__init__.py").exists()  # it would shadow Hugging Face's package of that name


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("y = x.to(tl.bfloat16)", "narrowing"),
        ("y = x.to(tl.float16)", "narrowing"),
        ("y = x.to(out_ptr.dtype.element_ty)", "narrowing"),
        ("y = x.to(COMPUTE)", "narrowing"),
        ("y = tl.cast(x, tl.bfloat16)", "narrowing"),
        ("y = x.to(dtype=tl.bfloat16)", "narrowing"),
        ("tl.store(out_ptr, x)", "stored value"),
        ("tl.store(out_ptr, x * 2.0, mask=mask)", "stored value"),
        ("tl.store(out_ptr, x.to(tl.float32))", "stored value"),
        ("y = tl.dot(a, b)", "input_precision"),
        ("y = tl.dot(a, b, acc)", "input_precision"),
    ],
)
def test_a_planted_fault_is_found(line: str, complaint: str) -> None:
    found = lint(f"@triton.jit\ndef _kernel(x, out_ptr):\n    {line}\n")
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.parametrize(
    "line",
    [
        "y = x.to(tl.float32)",
        "y = x.to(tl.int16, bitcast=True)",
        "y = narrow(x, out_ptr.dtype.element_ty)",
        "tl.store(out_ptr, narrow(x, out_ptr.dtype.element_ty))",
        "tl.store(out_ptr, keep.to(tl.uint8), mask=mask)",
        'y = tl.dot(a, b, acc, input_precision="ieee")',
    ],
)
def test_what_is_right_passes(line: str) -> None:
    assert lint(f"@triton.jit(do_not_specialize=['M'])\ndef _kernel(x, out_ptr):\n    {line}\n") == []


def test_functions_that_triton_does_not_compile_are_left_alone() -> None:
    assert lint("def launcher(x):\n    return x.to(torch.bfloat16)\n") == []


def test_every_launch_can_be_recorded() -> None:
    """By kernels/launch.py, which tells whoever records a call; ``kernel[grid](...)`` would tell nobody."""
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and path.name != "launch.py":
                assert not ast.unparse(node.func.value).endswith("_kernel"), f"{path.name}:{node.lineno}"


def test_every_launch_says_whether_products_and_sums_are_contracted() -> None:
    """Triton's default is another one from version 3.10 on, and of the environment."""
    from peftfast.kernels.launch import launch

    seen: list[dict[str, object]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: seen.append(constants)

    launch(Kernel(), (1,), BLOCK=8)
    launch(Kernel(), (1,), enable_fp_fusion=False)
    assert seen == [{"BLOCK": 8, "enable_fp_fusion": True}, {"enable_fp_fusion": False}]
