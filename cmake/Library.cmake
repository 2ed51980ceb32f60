# The library over torch, and the Python module over the library.

find_package(Torch REQUIRED)
if(NOT Torch_VERSION MATCHES "^2\\.13\\.")
  message(WARNING "torch_bn is written for torch 2.13 and not tested with torch ${Torch_VERSION}, in ${Torch_DIR}")
endif()

add_library(torch_bn_objects OBJECT
  csrc/nn/build_info.cpp
  csrc/nn/functional.cpp
  csrc/nn/modules.cpp
  csrc/nn/options.cpp
  csrc/nn/sequences.cpp
  csrc/nn/serve.cpp
  csrc/nn/sync.cpp
  csrc/ops/autograd.cpp
  csrc/ops/checks.cpp
  csrc/ops/cpu.cpp
  csrc/ops/plain.cpp
  csrc/ops/decompose.cpp
  csrc/ops/functorch.cpp
  csrc/ops/ghost.cpp
  csrc/ops/ghost_autograd.cpp
  csrc/ops/ghost_cpu.cpp
  csrc/ops/memory.cpp
  csrc/ops/meta.cpp
  csrc/ops/schema.cpp
  csrc/ops/sync.cpp
  csrc/ops/sync_agree.cpp
  csrc/ops/sync_autograd.cpp
  csrc/ops/sync_cpu.cpp)
target_compile_definitions(torch_bn_objects PRIVATE
  TORCH_BN_VERSION="${PROJECT_VERSION}"
  TORCH_BN_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
target_compile_options(torch_bn_objects PRIVATE -Wall -Wextra)
# It moves running statistics to the bits that the kernels have, which are compiled so too.
set_source_files_properties(csrc/ops/ghost_cpu.cpp PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
target_include_directories(torch_bn_objects PRIVATE csrc/include)
target_link_libraries(torch_bn_objects PRIVATE torch OpenMP::OpenMP_CXX)
set_target_properties(torch_bn_objects PROPERTIES POSITION_INDEPENDENT_CODE ON)

# What every form of the library asks of its users.
function(torch_bn_usage target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>
    $<INSTALL_INTERFACE:include>)
  target_link_libraries(${target} PUBLIC torch PRIVATE torch_bn_kernels OpenMP::OpenMP_CXX)
endfunction()

# A program that only loads a model with our operators refers to no symbol of the library, and a linker told
# --as-needed would drop it. So users link it through a target that says it is needed.
add_library(torch_bn SHARED $<TARGET_OBJECTS:torch_bn_objects>)
torch_bn_usage(torch_bn)
set_target_properties(torch_bn PROPERTIES EXPORT_NAME shared)
add_library(torch_bn::shared ALIAS torch_bn)
add_library(torch_bn_needed INTERFACE)
add_library(torch_bn::torch_bn ALIAS torch_bn_needed)
target_link_libraries(torch_bn_needed INTERFACE torch_bn)
target_link_options(torch_bn_needed INTERFACE
  "SHELL:-Wl,--push-state,--no-as-needed \"$<TARGET_FILE:torch_bn::shared>\" -Wl,--pop-state")
set_target_properties(torch_bn_needed PROPERTIES EXPORT_NAME torch_bn)

# The same objects as an archive, of which a linker would take none that no symbol asks for: all are named.
if(TORCH_BN_STATIC)
  add_library(torch_bn_archive STATIC $<TARGET_OBJECTS:torch_bn_objects>)
  torch_bn_usage(torch_bn_archive)
  set_target_properties(torch_bn_archive PROPERTIES OUTPUT_NAME torch_bn EXPORT_NAME archive)
  add_library(torch_bn::archive ALIAS torch_bn_archive)
  add_library(torch_bn_static INTERFACE)
  add_library(torch_bn::torch_bn_static ALIAS torch_bn_static)
  target_link_libraries(torch_bn_static INTERFACE $<LINK_LIBRARY:WHOLE_ARCHIVE,torch_bn::archive>)
  set_target_properties(torch_bn_kernels PROPERTIES EXPORT_NAME kernels)
endif()

if(TORCH_BN_PYTHON)
  # Inside a Python environment torch lies beside torch_bn; elsewhere whoever links the library has loaded it.
  set_target_properties(torch_bn PROPERTIES INSTALL_RPATH "$ORIGIN/../../torch/lib")
  find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG REQUIRED)
  find_library(TORCH_PYTHON_LIBRARY torch_python REQUIRED HINTS ${TORCH_INSTALL_PREFIX}/lib NO_CMAKE_FIND_ROOT_PATH)
  pybind11_add_module(_C csrc/python/layer.cpp csrc/python/module.cpp)
  target_link_libraries(_C PRIVATE torch_bn ${TORCH_PYTHON_LIBRARY})
  set_target_properties(_C PROPERTIES INSTALL_RPATH "$ORIGIN/lib")
  file(CONFIGURE OUTPUT _build_config.py CONTENT
"# Written by the build: the torch whose ABI the library has.
torch_version = \"${Torch_VERSION}\"
" @ONLY)
endif()

include(cmake/Install.cmake)
