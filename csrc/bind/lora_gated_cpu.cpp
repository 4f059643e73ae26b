// The end of a gated MLP, down(act(gate) * up) with a LoRA layer on a dense base, as one operator forward and one
// backward: bit for bit what the operators for each pass give. Every tensor is contiguous, gate and up [.., K] and dy
// [.., N] of any number of dimensions, and all but the factors have one dtype.
#include "bind/lora_layer_cpu.h"
#include "cpu/gated_activation.h"

namespace peftfast::bind {
namespace {

// Of gate and up; what is written comes as one row as well, since all of it is contiguous.
cpu::Gated gated_of(const Tensor& gate, const Tensor& up, int64_t activation) {
    check_cpu(gate, "gate");
    check_cpu(up, "up");
    check_contiguous(gate, "gate");
    check_contiguous(up, "up");
    check_dtype(up, "up", gate.scalar_type());
    STD_TORCH_CHECK(gate.dim() > 0 && shape_of(up) == shape_of(gate), "up: expected shape ", shape_of(gate), ", got ",
                    shape_of(up));
    STD_TORCH_CHECK(activation >= 0 && activation < cpu::kActivations, "activation: expected 0 to ",
                    cpu::kActivations - 1, ", got ", activation);
    cpu::Gated gated = {};
    gated.activation = static_cast<cpu::Activation>(activation);
    gated.dtype = float_dtype(gate, "gate");
    gated.rows = 1, gated.columns = gate.numel();
    gated.gate = {const_cast<void*>(gate.const_data_ptr()), gated.columns};
    gated.up = {const_cast<void*>(up.const_data_ptr()), gated.columns};
    return gated;
}

Tensor product_of(const Tensor& gate, cpu::Gated& gated) {
    Tensor h = torch::stable::empty_like(gate);
    gated.h = {h.mutable_data_ptr(), gated.columns};
    cpu::gated_activation(gated, torch_pool);
    return h;
}

std::tuple<Tensor, Tensor> lora_gated_forward(const Tensor& gate, const Tensor& up, int64_t activation,
                                              const Tensor& weight, const Optional& bias, const Tensor& a,
                                              const Tensor& b, const Optional& lora_bias, const Optional& seed,
                                              double p, double scaling) {
    cpu::Gated gated = gated_of(gate, up, activation);
    check_weight(weight, gate);
    flat(gate, "gate", weight.size(1));
    return layer_forward(product_of(gate, gated), weight, bias, a, b, lora_bias, seed, p, scaling);
}

// dgate and dup where needs_h, da of a_dtype and db of b's dtype: those that are needed, in this order.
std::vector<Tensor> lora_gated_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, int64_t activation,
                                        const Optional& weight, const Optional& a, const Tensor& b, const Optional& s,
                                        const Optional& seed, double p, double scaling, bool needs_h, bool needs_a,
                                        bool needs_b, ScalarType a_dtype) {
    STD_TORCH_CHECK(b.dim() == 2, "lora_b: expected two dimensions, got shape ", shape_of(b));
    STD_TORCH_CHECK(needs_h || needs_a || needs_b, "expected a gradient to be needed");
    cpu::Gated gated = gated_of(gate, up, activation);
    const int64_t inputs = gate.size(gate.dim() - 1);
    const cpu::Matrix dy_m = flat(dy, "dy", b.size(0));
    check_dtype(dy, "dy", gate.scalar_type());
    STD_TORCH_CHECK(flat(gate, "gate", inputs).rows == dy_m.rows, "gate: expected ", dy_m.rows, " rows, got shape ",
                    shape_of(gate));
    const cpu::Dropout dropout = mask_of(seed, p);
    const Between ds(dy_m.dtype, dy_m.rows, b.size(1));
    const Tensor db = output_side(dy_m, b, s, scaling, needs_b, *ds);
    std::vector<Tensor> grads;
    Tensor h;
    if (needs_h) {
        Tensor dh = input_side(dy, weight, a, dropout, *ds);
        STD_TORCH_CHECK(dh.numel() == gated.columns, "weight: expected ", inputs, " columns, got ", weight->size(1));
        Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
        gated.dh = {dh.mutable_data_ptr(), gated.columns};
        gated.dgate = {dgate.mutable_data_ptr(), gated.columns};
        gated.dup = {dup.mutable_data_ptr(), gated.columns};
        if (needs_a) gated.h = gated.dh;  // h takes the place of its gradient, element by element
        cpu::gated_activation_backward(gated, torch_pool);
        grads.push_back(dgate);
        grads.push_back(dup);
        h = dh;
    } else if (needs_a) {
        h = product_of(gate, gated);
    }
    if (needs_a) grads.push_back(factor_grad(flat(h, "h", inputs), dropout, *ds, a_dtype));
    if (needs_b) grads.push_back(db);
    return grads;
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "lora_gated_forward(Tensor gate, Tensor up, int activation, Tensor weight, Tensor? bias, Tensor lora_a, "
        "Tensor lora_b, Tensor? lora_bias, Tensor? seed, float p, float scaling) -> (Tensor, Tensor)");
    m.def(
        "lora_gated_backward(Tensor dy, Tensor gate, Tensor up, int activation, Tensor? weight, Tensor? lora_a, "
        "Tensor lora_b, Tensor? s, Tensor? seed, float p, float scaling, bool needs_h, bool needs_a, bool needs_b, "
        "ScalarType a_dtype) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("lora_gated_forward", TORCH_BOX(&peftfast::bind::lora_gated_forward));
    m.impl("lora_gated_backward", TORCH_BOX(&peftfast::bind::lora_gated_backward));
}
