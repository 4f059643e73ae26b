// A LoRA layer's forward and backward on a dense base as one operator each: the same library product and the same
// passes as one by one, bit for bit, without the way through Python between them. Every tensor is contiguous, x [.., K]
// and dy [.., N] of any number of dimensions, and base, x and result have one dtype.
#include "bind/lora_layer_cpu.h"

namespace peftfast::bind {
namespace {

// dx, da of a_dtype and db of b's dtype: those that are needed, in this order.
std::vector<Tensor> lora_layer_backward(const Tensor& dy, const Optional& x, const Optional& weight, const Optional& a,
                                        const Tensor& b, const Optional& s, const Optional& seed, double p,
                                        double scaling, bool needs_x, bool needs_a, bool needs_b, ScalarType a_dtype) {
    STD_TORCH_CHECK(b.dim() == 2, "lora_b: expected two dimensions, got shape ", shape_of(b));
    STD_TORCH_CHECK(needs_x || needs_a || needs_b, "expected a gradient to be needed");
    const cpu::Matrix dy_m = flat(dy, "dy", b.size(0));
    const cpu::Dropout dropout = mask_of(seed, p);
    const Between ds(dy_m.dtype, dy_m.rows, b.size(1));
    const Tensor db = output_side(dy_m, b, s, scaling, needs_b, *ds);
    std::vector<Tensor> grads;
    if (needs_x) grads.push_back(input_side(dy, weight, a, dropout, *ds));
    if (needs_a) {
        STD_TORCH_CHECK(x.has_value() && x->dim() > 0, "x: expected beside needs_a");
        grads.push_back(factor_grad(flat(*x, "x", x->size(x->dim() - 1)), dropout, *ds, a_dtype));
    }
    if (needs_b) grads.push_back(db);
    return grads;
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "lora_layer_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? lora_bias, "
        "Tensor? seed, float p, float scaling) -> (Tensor, Tensor)");
    m.def(
        "lora_layer_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_a, Tensor lora_b, Tensor? s, "
        "Tensor? seed, float p, float scaling, bool needs_x, bool needs_a, bool needs_b, ScalarType a_dtype) -> "
        "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("lora_layer_forward", TORCH_BOX(&peftfast::bind::layer_forward));
    m.impl("lora_layer_backward", TORCH_BOX(&peftfast::bind::lora_layer_backward));
}
