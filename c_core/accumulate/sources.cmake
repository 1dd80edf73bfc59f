target_sources(sluice_objects PRIVATE
  accumulate/accumulate.c accumulate/reference.c accumulate/validate.c)

# The contract rounds products and sums one by one: fused multiply-adds would give other bits on other tiers.
set_source_files_properties(accumulate/reference.c PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR SLUICE_EMULATED)
  sluice_overlay(accumulate/tiers/avx2.c ${SLUICE_AVX2_FLAGS} -ffp-contract=off)
  sluice_overlay(accumulate/tiers/avx512.c ${SLUICE_AVX512_FLAGS} -ffp-contract=off)
endif()
if(SLUICE_BUILD_CUDA)
  target_sources(sluice_objects PRIVATE accumulate/cuda/accumulate.cu)
endif()
