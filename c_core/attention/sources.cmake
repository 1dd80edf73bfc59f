target_sources(sluice_objects PRIVATE
  attention/backward.c attention/backward_queries.c attention/chunk.c attention/dropout.c attention/exact_row.c
  attention/few_rows.c attention/forward.c attention/gated_attention.c attention/gradient_rows.c attention/kernels.c
  attention/key_gradients.c attention/key_ranges.c attention/mask_gradient.c attention/output_gate.c attention/pages.c
  attention/plan.c attention/profile.c attention/reference.c attention/row_team.c attention/rows.c
  attention/score_bend.c attention/sort.c
  attention/staircase.c attention/validate.c attention/tiers/scalar.c)

# Overlays of the micro-op table; kernels.def names them.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR SLUICE_EMULATED)
  target_compile_definitions(sluice_objects PRIVATE SL_X86_OVERLAYS=1)
  foreach(part avx2 avx2_multiply avx2_softmax avx2_bend avx2_backward avx2_rows)
    sluice_overlay(attention/tiers/${part}.c ${SLUICE_AVX2_FLAGS})
  endforeach()
  foreach(part avx512 avx512_tiles avx512_bend avx512_backward avx512_rows)
    sluice_overlay(attention/tiers/${part}.c ${SLUICE_AVX512_FLAGS})
  endforeach()
  sluice_overlay(attention/tiers/avx512bf16.c ${SLUICE_AVX512BF16_FLAGS})
else()
  target_compile_definitions(sluice_objects PRIVATE SL_X86_OVERLAYS=0)
endif()

if(SLUICE_BUILD_CUDA)
  target_sources(sluice_objects PRIVATE attention/cuda/gated_attention.cu)
endif()
