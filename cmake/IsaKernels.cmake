# The torch-free kernels: one source compiled once per instruction set, and the dispatch between them.
#
# No flag here lets the compiler change a result: contraction is off, so that no multiplication and addition
# are fused on one set and not on another; of -ffast-math only what changes no result is on, no errno and no traps.

set(TORCH_BN_KERNEL_OPTIMISATION -O3 CACHE STRING "How the kernels are optimised; no value changes a result")
set(TORCH_BN_KERNEL_FLAGS ${TORCH_BN_KERNEL_OPTIMISATION} -ffp-contract=off -fno-math-errno -fno-trapping-math)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(TORCH_BN_ISAS baseline avx2 avx512)
  set(TORCH_BN_FLAGS_baseline "")
  set(TORCH_BN_FLAGS_avx2 -mavx2 -mfma)
  set(TORCH_BN_FLAGS_avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(TORCH_BN_ISAS neon)
  set(TORCH_BN_FLAGS_neon "")
else()
  set(TORCH_BN_ISAS baseline)
  set(TORCH_BN_FLAGS_baseline "")
endif()

add_library(torch_bn_kernels STATIC csrc/kernels/dispatch.cpp)
foreach(isa IN LISTS TORCH_BN_ISAS)
  add_library(torch_bn_kernels_${isa} OBJECT csrc/kernels/isa.cpp)
  target_compile_definitions(torch_bn_kernels_${isa} PRIVATE TORCH_BN_ISA=${isa})
  target_compile_options(torch_bn_kernels_${isa} PRIVATE ${TORCH_BN_FLAGS_${isa}})
  target_sources(torch_bn_kernels PRIVATE $<TARGET_OBJECTS:torch_bn_kernels_${isa}>)
  list(APPEND TORCH_BN_KERNEL_TARGETS torch_bn_kernels_${isa})
endforeach()

foreach(target IN LISTS TORCH_BN_KERNEL_TARGETS ITEMS torch_bn_kernels)
  target_compile_options(${target} PRIVATE ${TORCH_BN_KERNEL_FLAGS} -Wall -Wextra -Werror=vla
    # The intrinsics of GCC 12 start from registers that they leave undefined on purpose.
    -Wno-maybe-uninitialized -Wno-uninitialized)
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
endforeach()
