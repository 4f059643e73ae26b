// Which of the instruction sets compiled into the library runs.
#pragma once

#include <stddef.h>

namespace peftfast::cpu {

enum class Isa : int { scalar, avx2, avx512 };

Isa current_isa();
const char* isa_name(Isa isa);

// Takes "auto", "avx512", "avx2" or "scalar". Returns nullptr, or why the name cannot be had; the choice is then
// unchanged.
const char* choose_isa(const char* name);

}  // namespace peftfast::cpu
