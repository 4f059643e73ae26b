"""peftfast.patch on PEFT's SHiRA layers."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira.layer import Linear as StockLinear
from torch import Tensor, nn

import peftfast
import peftfast.functional as F
from peftfast.integrations.shira import FusedLinear
from peftfast.methods import load_shira, save_shira
from peftfast.nn import SparseDeltaLinear
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.lora_checks import BF16, F32

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
FOUR_BIT = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="PEFT's SHiRA takes no 4-bit base before 0.20"
)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype, four_bit: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(64, 128).to(dtype), nn.Linear(128, 64, bias=False).to(dtype)
        self.first, self.second = (_four_bit(layer) if four_bit else layer for layer in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def _four_bit(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype)
    packed.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    packed.bias = layer.bias
    packed.support_avx512bf16_for_cpu = False
    return packed.to("cpu")


def model(dtype: torch.dtype = F32, four_bit: bool = False, **options: Any) -> Any:
    config = ShiraConfig(r=2, target_modules=["first", "second"], init_weights=False, random_seed=3, **options)
    torch.manual_seed(1)
    return get_peft_model(Net(dtype, four_bit), config)


def step(net: Any, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    net.zero_grad()
    y = net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("dtype", "four_bit"),
    [(F32, False), (BF16, False), pytest.param(F32, True, marks=FOUR_BIT), pytest.param(BF16, True, marks=FOUR_BIT)],
)
def test_patched_is_stock(dtype: torch.dtype, four_bit: bool) -> None:
    net = model(dtype, four_bit)
    stock = step(net, dtype)
    bases = [net.base_model.model.first.base_layer.weight.detach().clone() for _ in "1"]
    report = peftfast.patch(net)
    assert len(report.fused) == 2 and not report.stock
    assert all("sparse_delta [" in kernel and ("nf4" in kernel) == four_bit for kernel in report.fused.values())
    fused = step(net, dtype)
    assert len(stock) == len(fused) == 4
    for one, other in zip(stock, fused, strict=True):
        assert (one - other).abs().max() <= (1e-5 if dtype == F32 else 2e-2) * one.abs().max()
    assert torch.equal(net.base_model.model.first.base_layer.weight, bases[0])
    assert repr(net).count("shira.Linear") == 2 and isinstance(net.base_model.model.first, StockLinear)
    peftfast.unpatch(net)
    assert type(net.base_model.model.first) is StockLinear
    assert "_peftfast_patterns" not in net.base_model.model.first.__dict__
    assert all(torch.equal(a, b) for a, b in zip(stock, step(net, dtype), strict=True))


@FOUR_BIT
def test_repacking_is_switched_off_named_and_restored() -> None:
    net = model(four_bit=True)
    first, second = net.base_model.model.first, net.base_model.model.second
    first.base_layer.support_avx512bf16_for_cpu = True
    notes = {row.name: row.note for row in peftfast.patch(net).layers}
    assert len(notes) == 2 and "support_avx512bf16_for_cpu" in notes["base_model.model.first"]
    assert not notes["base_model.model.second"] and not first.base_layer.support_avx512bf16_for_cpu
    peftfast.unpatch(net)
    assert first.base_layer.support_avx512bf16_for_cpu and not second.base_layer.support_avx512bf16_for_cpu
    assert not any(row.note for row in peftfast.report(net).layers)


def test_no_dense_gradient_and_no_kept_clone() -> None:
    net = model()
    peftfast.patch(net)
    x = torch.randn(40, 64)
    with saved_tensors() as saved:
        net(x)
    allowed = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert not [t for at, t in storages(saved).items() if at not in allowed and t >= 64 * 128 * 4]
    with Calls() as calls:
        net(x).sum().backward()
    assert calls.compute["sparse_delta_dvalues"] == 2 and calls.compute["sparse_delta_patch"] == 3
    assert calls.compute["clone"] == 0
    # Of few rows no copy of the weight is made: the delta is a product of its own.
    with Calls() as calls, torch.no_grad():
        net(x[:3])
    assert calls.compute["sparse_delta_product_"] == 2 and calls.compute["sparse_delta_patch"] == 0


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=FOUR_BIT)])
def test_the_report_names_the_kernels_of_few_rows(four_bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(BF16, four_bit)
    peftfast.patch(net)
    beside = "nf4_linear + " if four_bit else ""
    kernels = list(peftfast.report(net).fused.values())
    found = re.search(r"\], up to (\d+) rows (.*)sparse_delta_product_$", kernels[0])
    assert found is not None and found[2] == beside and all(one.endswith(found[0]) for one in kernels), kernels
    most = int(found[1])
    assert most == 32 or (four_bit and most == 16)  # beside a packed weight as the processor multiplies bfloat16 or not
    calls = []
    for rows in (most, most + 1):
        with Calls() as counted, torch.no_grad():
            net(torch.randn(rows, 64).to(BF16))
        calls.append(counted.compute["sparse_delta_product_"])
    assert calls == [2, 0]
    # A support too dense for that says so by silence, and the row follows what is there at each report.
    monkeypatch.setattr("peftfast.configs.sparse_delta.APART_DENSITY", 0.001)
    assert all(kernel.endswith("]") for kernel in peftfast.report(net).fused.values())


def test_files_are_pefts(tmp_path: Path) -> None:
    plain, patched = model(), model()
    peftfast.patch(patched)
    for name, net in (("plain", plain), ("patched", patched)):
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data = torch.arange(parameter.numel()) * 1e-3
        net.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "patched")]
    assert files[0] == files[1]
    loaded = PeftModel.from_pretrained(Net(F32, False), tmp_path / "patched")
    x = torch.randn(3, 64)
    assert torch.allclose(loaded(x), patched(x), atol=1e-6)
    peftfast.patch(loaded)
    assert torch.equal(loaded(x), patched(x))


def test_states_of_peft() -> None:
    net, base = model(), Net(F32, False)
    peftfast.patch(net)
    x = torch.randn(3, 64)
    adapted = net(x)
    with net.disable_adapter():
        assert torch.equal(net(x), base(x))
    net.merge_adapter()
    assert torch.allclose(net(x), adapted, atol=1e-5)
    net.unmerge_adapter()
    assert torch.allclose(net(x), adapted, atol=1e-5)
    net.base_model.model.first.set_scale("default", 2.0)
    stock = model()
    stock.load_state_dict(net.state_dict())
    stock.base_model.model.first.set_scale("default", 2.0)
    assert torch.allclose(net(x), stock(x), atol=1e-5) and not torch.allclose(net(x), adapted, atol=1e-5)


def _several(net: Any) -> None:
    net.add_adapter("other", ShiraConfig(r=2, target_modules=["first", "second"]))
    net.base_model.set_adapter(["default", "other"])


def _unsorted(net: Any) -> None:
    for layer in (net.base_model.model.first, net.base_model.model.second):
        layer.shira_indices["default"] = layer.shira_indices["default"].flip(1)


GUARDS = {
    "several active adapters": _several,
    "a hook on the base layer": lambda net: [
        m.base_layer.register_forward_hook(lambda *_: None) for m in net.modules() if isinstance(m, StockLinear)
    ],
    "SHiRA indices: expected ascending": _unsorted,
    "the base weight is torch.float64": lambda net: net.double(),
    "forward is overridden on the layer itself": lambda net: [
        m.__dict__.__setitem__("forward", functools.partial(m.forward))
        for m in net.modules()
        if isinstance(m, StockLinear)
    ],
}


@pytest.mark.parametrize("reason", GUARDS)
def test_guards_leave_stock(reason: str) -> None:
    net = model()
    GUARDS[reason](net)
    dtype = next(net.parameters()).dtype
    x = torch.randn(3, 64, dtype=dtype)
    expected = copy.deepcopy(net)(x) if "overridden" not in reason else net(x)
    report = peftfast.patch(net)
    assert len(report.stock) == 2 and all(reason in found for found in report.stock.values()), report
    assert torch.equal(net(x), expected)
    with pytest.raises(RuntimeError, match="would stay stock"):
        peftfast.patch(net, strict=True)


def test_guards_are_asked_at_each_call() -> None:
    net = model()
    peftfast.patch(net)
    first = net.base_model.model.first
    x = torch.randn(3, 64)
    expected = net(x)
    _unsorted(net)
    first.shira_indices["default"] = first.shira_indices["default"].flip(1)
    assert peftfast.report(net).fused.keys() == {"base_model.model.first"}
    assert isinstance(first, FusedLinear) and not torch.allclose(net(x), expected)
    net.base_model.model.second.shira_indices["default"] = net.base_model.model.second.shira_indices["default"].flip(1)
    assert len(peftfast.report(net).fused) == 2 and torch.equal(net(x), expected)
    first.shira_indices["default"][0, 0] = 127  # in place: seen by its version
    assert "expected ascending" in peftfast.report(net).stock["base_model.model.first"]


class Tripled(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made * 3 if func is nn.functional.linear else made


INPUTS: dict[str, Any] = {
    "a subclass": lambda: torch.ones(3, 64).as_subclass(Tripled),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 64), torch.ones(5, 64)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3, 64), torch.ones(5, 64)], layout=torch.jagged),
    "sparse": lambda: torch.eye(64).to_sparse(),
    "of another width": lambda: torch.ones(3, 63),
    "of no dimension": lambda: torch.ones(()),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_is_not_served_gets_stock_s_result_or_error(name: str) -> None:
    found: list[Any] = []
    for patched in (False, True):
        net = model()
        if patched:
            peftfast.patch(net)
        try:
            y = net.base_model.model.first(INPUTS[name]())
        except Exception as error:
            found.append((type(error), str(error)))
            continue
        (sum(one.sum() for one in y.unbind()) if y.is_nested else y.sum()).backward()
        found.append([*y.unbind(), *(p.grad for p in net.parameters() if p.grad is not None)])
    if isinstance(found[0], tuple):
        assert found[0] == found[1]
    else:
        assert len(found[0]) == len(found[1]) > 1
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_base_weight_that_is_trained_has_no_gradient_as_in_stock() -> None:
    """PEFT's forward reads weight.data; the bias is read as it is."""
    for patched in (False, True):
        net = model()
        if patched:
            peftfast.patch(net)
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        step(net, F32)
        with_gradient = {name.split(".", 3)[-1] for name, p in net.named_parameters() if p.grad is not None}
        assert with_gradient == {"base_layer.bias", "shira_weight.default"}, patched


def test_beside_lora_layers() -> None:
    from peft import LoraConfig

    net = nn.ModuleDict({"a": model(), "b": get_peft_model(Net(F32, False), LoraConfig(r=2, target_modules=["first"]))})
    kinds = [row.layer for row in peftfast.patch(net).layers]
    assert sorted(kinds) == ["lora.Linear", "shira.Linear", "shira.Linear"]
    peftfast.unpatch(net)
    assert not any(isinstance(m, FusedLinear) for m in net.modules())


def adapted(resident: bool = False) -> Net:
    net = Net(F32, False)
    generator = torch.Generator().manual_seed(4)
    for name in ("first", "second"):
        linear = getattr(net, name)
        pattern = F.choose_support(linear.weight, 2 * 192 / (64 * 128), generator=generator)
        layer = SparseDeltaLinear.from_linear(linear, indices=pattern, resident=resident)
        with torch.no_grad():
            layer.delta_values.copy_(torch.randn(384, generator=generator) * 0.1)
        setattr(net, name, layer)
    return net


@pytest.mark.parametrize("resident", [False, True])
def test_stock_peft_loads_what_was_trained_here(resident: bool, tmp_path: Path) -> None:
    net = adapted(resident)
    save_shira(net, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(Net(F32, False), tmp_path / "new")
    x = torch.randn(3, 64)
    assert torch.allclose(loaded(x), net(x), atol=1e-5)
    other = Net(F32, False)
    assert load_shira(other, tmp_path / "new", resident=resident) == ["first", "second"]
    assert torch.equal(other(x), net(x)) and other.first.merged == resident
    third = adapted(resident)
    with torch.no_grad():
        third.first.delta_values.zero_()
    load_shira(third, tmp_path / "new")
    assert torch.equal(third(x), net(x)) and third.first.merged == resident


def test_what_stock_peft_saved_loads_here(tmp_path: Path) -> None:
    stock = model()
    stock.save_pretrained(tmp_path)
    net = Net(F32, False)
    load_shira(net, tmp_path)
    x = torch.randn(3, 64)
    assert torch.allclose(net(x), stock(x), atol=1e-5)


def test_a_module_that_was_saved_whole_is_loaded(tmp_path: Path) -> None:
    stock = get_peft_model(Net(F32, False), ShiraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    with torch.no_grad():
        stock.base_model.model.second.modules_to_save["default"].weight.normal_()
    stock.save_pretrained(tmp_path / "peft")
    net, x = Net(F32, False), torch.randn(3, 64)
    assert load_shira(net, tmp_path / "peft") == ["first"]
    assert torch.allclose(net(x), stock(x), atol=1e-5)
    save_shira(net, tmp_path / "ours", modules_to_save=["second"])
    again = Net(F32, False)
    load_shira(again, tmp_path / "ours")
    assert torch.equal(again(x), net(x))
    other = Net(F32, False)
    other.second = nn.Linear(other.second.in_features, 7)
    before = other.second.weight.clone()
    with pytest.raises(ValueError, match="modules_to_save: second: expected the tensors"):
        load_shira(other, tmp_path / "ours")
    assert torch.equal(other.second.weight, before) and type(other.first) is nn.Linear


def test_bad_shira_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="expected SparseDeltaLinear layers"):
        save_shira(Net(F32, False), tmp_path)
    uneven = Net(F32, False)
    uneven.first = SparseDeltaLinear.from_linear(uneven.first, density=0.01)
    with pytest.raises(ValueError, match=r"first: expected r \(N \+ K\)"):
        save_shira(uneven, tmp_path)
    assert not list(tmp_path.iterdir())
    save_shira(adapted(), tmp_path)
    good = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.first.shira_indices"
    for change, message in (
        ({first: good[first] + 64}, "outside a weight"),
        ({first: good[first][:, :1].repeat(1, 384)}, "repeated"),
        ({first: good[first][:, :-1].contiguous()}, "expected shira_indices of shape"),
        ({"base_model.model.third.shira_weight": torch.ones(2)}, "third: expected a linear layer"),
    ):
        save_file({**good, **change}, tmp_path / "adapter_model.safetensors")
        net = Net(F32, False)
        with pytest.raises(ValueError, match=message):
            load_shira(net, tmp_path)
        assert type(net.first) is nn.Linear and type(net.second) is nn.Linear
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="expected the peft_type SHIRA"):
        load_shira(Net(F32, False), tmp_path)
