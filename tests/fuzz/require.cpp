#include <cstdio>
#include <cstdlib>

#include "bytes.h"

namespace torch_bn::fuzz {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

}  // namespace torch_bn::fuzz
