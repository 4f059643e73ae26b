#include <torch/csrc/stable/library.h>

#include <string>

namespace peftfast::bind {
namespace {

// As setup.py was told: the GPUs whose machine code is in the library, separated by semicolons, and PTX of the last.
std::string architectures() { return PEFTFAST_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) { m.def("architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CompositeExplicitAutograd, m) {
    m.impl("architectures", TORCH_BOX(&peftfast::bind::architectures));
}
