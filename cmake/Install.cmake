# What is installed: library, headers and package config as the component `library`, the archive as `static`, and
# what the Python package adds to the library, on request only, as `python`. All paths in the config are relative.

include(CMakePackageConfigHelpers)

set(package_dir share/cmake/torch_bn)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_bn_TORCH_MINOR "${Torch_VERSION}")
configure_package_config_file(cmake/torch_bnConfig.cmake.in torch_bnConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(torch_bnConfigVersion.cmake COMPATIBILITY SameMinorVersion)

install(TARGETS torch_bn torch_bn_needed EXPORT torch_bnTargets LIBRARY DESTINATION lib COMPONENT library)
install(EXPORT torch_bnTargets NAMESPACE torch_bn:: DESTINATION ${package_dir} COMPONENT library)
install(DIRECTORY csrc/include/torch_bn DESTINATION include COMPONENT library)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/torch_bnConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/torch_bnConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT library)

if(TORCH_BN_STATIC)
  install(TARGETS torch_bn_archive torch_bn_kernels torch_bn_static EXPORT torch_bnStaticTargets
    ARCHIVE DESTINATION lib COMPONENT static)
  install(EXPORT torch_bnStaticTargets NAMESPACE torch_bn:: DESTINATION ${package_dir} COMPONENT static)
endif()

if(TORCH_BN_PYTHON)
  install(TARGETS _C LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_config.py DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
endif()
