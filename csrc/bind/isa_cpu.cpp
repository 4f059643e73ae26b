#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace peftfast::bind {
namespace {

void set_isa(const std::string& name) {
    const char* reason = cpu::choose_isa(name.c_str());
    STD_TORCH_CHECK(reason == nullptr, "set_isa: '", name, "': ", reason ? reason : "");
}

std::string isa() { return cpu::isa_name(cpu::current_isa()); }

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def("set_isa(str name) -> ()");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CompositeExplicitAutograd, m) {
    m.impl("set_isa", TORCH_BOX(&peftfast::bind::set_isa));
    m.impl("isa", TORCH_BOX(&peftfast::bind::isa));
}
