// Which kernels run: chosen once, when the library is loaded.
#pragma once

#include <string>
#include <vector>

#include "api.h"

namespace torch_bn::kernels {

// The chosen instruction set. Throws std::runtime_error in words when TORCH_BN_ISA holds an unknown name or
// one that this processor lacks; every call does, because a library must not fail while it is being loaded.
const KernelTable& active();

// Names this build has kernels for and this processor can run, weakest first.
std::vector<std::string> supported_isas();

// Names this build has kernels for, weakest first.
std::vector<std::string> built_isas();

// The kernels of a name out of supported_isas(), or nullptr.
const KernelTable* find_isa(const std::string& name);

// Bytes of a result from which on it is better written past the caches than through them: half of the last
// level, as far as the system tells.
std::int64_t stream_from();

}  // namespace torch_bn::kernels
