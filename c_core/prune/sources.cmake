target_sources(sluice_objects PRIVATE prune/prune.c prune/reference.c prune/validate.c)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR SLUICE_EMULATED)
  sluice_overlay(prune/tiers/avx2.c ${SLUICE_AVX2_FLAGS})
endif()
