target_sources(sluice_objects PRIVATE
  quantize/conv2d.c quantize/kernels.c quantize/linear.c quantize/pack.c quantize/panel.c quantize/quantize.c quantize/reference.c
  quantize/rows.c quantize/scalar.c quantize/validate.c)

# The contract rounds x * inverse once: a fused multiply-add would give other integers on other tiers.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR SLUICE_EMULATED)
  sluice_overlay(quantize/avx2.c ${SLUICE_AVX2_FLAGS} -fno-math-errno)
endif()
