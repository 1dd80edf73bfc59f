# Finds SIMDe, headers that spell every x86 intrinsic in portable C, and has everything native compiled against it.
find_package(Python3 QUIET COMPONENTS Interpreter)
if(Python3_FOUND AND NOT SLUICE_SIMDE_INCLUDE_DIR)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
      "from importlib.metadata import distribution as d; print(d('cmeel-simde').locate_file('cmeel.prefix/include'), end='')"
    OUTPUT_VARIABLE simde_of_python ERROR_QUIET)
endif()
find_path(SLUICE_SIMDE_INCLUDE_DIR simde/x86/avx512.h HINTS "${simde_of_python}"
  DOC "Folder that holds simde/x86/avx512.h")
if(NOT SLUICE_SIMDE_INCLUDE_DIR)
  message(FATAL_ERROR "SLUICE_EMULATED is on, and simde/x86/avx512.h was not found. "
    "Run 'pip install cmeel-simde==0.8.2' (and pass -DPython3_EXECUTABLE=... of that Python), "
    "or 'apt-get install libsimde-dev', or pass -DSLUICE_SIMDE_INCLUDE_DIR=...")
endif()
target_compile_definitions(sluice_options INTERFACE SL_EMULATED=1)
target_include_directories(sluice_options SYSTEM INTERFACE "${SLUICE_SIMDE_INCLUDE_DIR}")
target_compile_options(sluice_options INTERFACE -Wno-psabi)
