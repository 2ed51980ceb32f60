# The library over torch, and the Python module over the library.

find_package(Torch REQUIRED)
if(NOT Torch_VERSION MATCHES "^2\\.13\\.")
  message(FATAL_ERROR "torch_bn needs torch 2.13, found torch ${Torch_VERSION} in ${Torch_DIR}")
endif()

add_library(torch_bn SHARED
  csrc/nn/build_info.cpp
  csrc/ops/autograd.cpp
  csrc/ops/checks.cpp
  csrc/ops/cpu.cpp
  csrc/ops/decompose.cpp
  csrc/ops/functorch.cpp
  csrc/ops/memory.cpp
  csrc/ops/meta.cpp
  csrc/ops/schema.cpp)
add_library(torch_bn::torch_bn ALIAS torch_bn)
target_compile_features(torch_bn PUBLIC cxx_std_20)
target_compile_definitions(torch_bn PRIVATE
  TORCH_BN_VERSION="${PROJECT_VERSION}"
  TORCH_BN_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
target_compile_options(torch_bn PRIVATE -Wall -Wextra)
target_include_directories(torch_bn PUBLIC
  $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include>
  $<INSTALL_INTERFACE:include>)
target_link_libraries(torch_bn PUBLIC torch PRIVATE torch_bn_kernels OpenMP::OpenMP_CXX)

# Inside a Python environment torch lies beside torch_bn; elsewhere Python has loaded it already.
if(TORCH_BN_PYTHON)
  set_target_properties(torch_bn PROPERTIES INSTALL_RPATH "$ORIGIN/../../torch/lib")
  find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG REQUIRED)
  find_library(TORCH_PYTHON_LIBRARY torch_python REQUIRED HINTS ${TORCH_INSTALL_PREFIX}/lib NO_CMAKE_FIND_ROOT_PATH)
  pybind11_add_module(_C csrc/python/layer.cpp csrc/python/module.cpp)
  target_link_libraries(_C PRIVATE torch_bn ${TORCH_PYTHON_LIBRARY})
  set_target_properties(_C PROPERTIES INSTALL_RPATH "$ORIGIN/lib")
  install(TARGETS _C LIBRARY DESTINATION .)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_config.py DESTINATION .)
  file(CONFIGURE OUTPUT _build_config.py CONTENT
"# Written by the build: the torch whose ABI the library has.
torch_version = \"${Torch_VERSION}\"
" @ONLY)
endif()

install(TARGETS torch_bn LIBRARY DESTINATION lib)
install(DIRECTORY csrc/include/torch_bn DESTINATION include)
