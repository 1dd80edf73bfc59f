target_sources(sluice_objects PRIVATE
  quantize/conv2d.c quantize/kernels.c quantize/linear.c quantize/lookup.c quantize/pack.c quantize/panel.c quantize/quantize.c
  quantize/recurrent.c quantize/reference.c quantize/rows.c quantize/tiers/scalar.c quantize/validate.c)

# Overlays; kernels.def names them.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR SLUICE_EMULATED)
  sluice_overlay(quantize/tiers/avx2.c ${SLUICE_AVX2_FLAGS})
  sluice_overlay(quantize/tiers/avx2_seven.c ${SLUICE_AVX2_FLAGS})
  sluice_overlay(quantize/tiers/avx2_finish.c ${SLUICE_AVX2_FLAGS})
  sluice_overlay(quantize/tiers/avx2_rows.c ${SLUICE_AVX2_FLAGS} -fno-math-errno)
  sluice_overlay(quantize/tiers/avx512vnni.c ${SLUICE_AVX512VNNI_FLAGS})
endif()
