# Run with cmake -P by the test install.consumer: fails at the first step that fails.
set(prefix "${BUILD_DIR}/install test/prefix")
set(moved "${BUILD_DIR}/install test/moved prefix")
set(program_dir "${BUILD_DIR}/install test/program")
file(REMOVE_RECURSE "${BUILD_DIR}/install test")

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  message("${output}")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "failed (${result}): ${ARGV}")
  endif()
endfunction()

# The tree is moved after the install: neither package file may hold the prefix.
run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${prefix}")
file(RENAME "${prefix}" "${moved}")

run("${CMAKE_COMMAND}" -S "${SOURCE_DIR}/consumer" -B "${program_dir}" -G "${GENERATOR}"
  "-DCMAKE_C_COMPILER=${C_COMPILER}" "-DCMAKE_PREFIX_PATH=${moved}")
run("${CMAKE_COMMAND}" --build "${program_dir}")
run("${program_dir}/consumer")
run("${program_dir}/consumer_static")

find_program(PKG_CONFIG pkg-config)
if(NOT PKG_CONFIG)
  message("pkg-config is not installed: its half of this test is left out")
  return()
endif()
set(ENV{PKG_CONFIG_PATH} "${moved}/${LIB_DIR}/pkgconfig")
execute_process(COMMAND "${PKG_CONFIG}" --cflags --libs sluice OUTPUT_VARIABLE flags COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags UNIX_COMMAND "${flags}")
run("${C_COMPILER}" -std=c11 "${SOURCE_DIR}/consumer/consumer.c" -o "${program_dir}/consumer_pkg_config" ${flags}
  "-Wl,-rpath,${moved}/${LIB_DIR}" -lm -pthread)
run("${program_dir}/consumer_pkg_config")
