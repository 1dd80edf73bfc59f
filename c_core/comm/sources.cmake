target_sources(sluice_objects PRIVATE
  comm/collectives.c comm/exchange.c comm/group.c comm/inbox.c comm/memory.c comm/pace.c comm/reductions.c
  comm/segment.c comm/step.c comm/transfers.c comm/reduce.c comm/reduce_validate.c comm/reference.c comm/tiers/scalar.c)

# Products and sums are rounded one by one: fused multiply-adds would give other bits on other tiers.
set_source_files_properties(comm/reference.c comm/tiers/scalar.c PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR SLUICE_EMULATED)
  sluice_overlay(comm/tiers/avx2.c ${SLUICE_AVX2_FLAGS} -ffp-contract=off)
  sluice_overlay(comm/tiers/avx512.c ${SLUICE_AVX512_FLAGS} -ffp-contract=off)
endif()
