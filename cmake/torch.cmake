# Sets SLUICE_TORCH_DIR, the folder of the torch package, by asking Python: find_package(Torch) fails on a CUDA build of
# torch where the full toolkit is not installed. Asked twice, the second time with -E, because a build front end's
# isolation hides the environment's packages by PYTHONPATH.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
foreach(flags "" "-E")
  execute_process(COMMAND "${Python3_EXECUTABLE}" ${flags} "${PROJECT_SOURCE_DIR}/tools/find_torch.py"
    OUTPUT_VARIABLE SLUICE_TORCH_DIR ERROR_VARIABLE torch_problem RESULT_VARIABLE torch_missing
    ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT torch_missing)
    break()
  endif()
endforeach()
if(torch_missing)
  message(FATAL_ERROR "SLUICE_BUILD_TORCH is on, but ${torch_problem}. "
    "Install torch >= 2.11 there, or pass -DPython3_EXECUTABLE=... of a Python that has it.")
endif()
message(STATUS "Building the operators against ${SLUICE_TORCH_DIR}")
