# cmake --install: headers, the C library, a CMake package file and a pkg-config file. The operator library is the
# component "python" alone, which the wheel takes; a plain install leaves it out, since it belongs to a Python package.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS sluice sluice_static EXPORT sluice-targets COMPONENT c INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ops/sluice DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT c FILES_MATCHING PATTERN "*.h")

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sluice)
install(EXPORT sluice-targets NAMESPACE sluice:: DESTINATION ${package_dir} COMPONENT c)
configure_package_config_file(cmake/sluice-config.cmake.in sluice-config.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(sluice-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/sluice-config.cmake ${PROJECT_BINARY_DIR}/sluice-config-version.cmake
  DESTINATION ${package_dir} COMPONENT c)

# The prefix is taken from where the file lies, so that an installed tree can be moved.
file(RELATIVE_PATH SLUICE_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
set(SLUICE_PC_PREFIX "\${pcfiledir}/${SLUICE_PC_PREFIX}")
configure_file(cmake/sluice.pc.in sluice.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/sluice.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT c)
