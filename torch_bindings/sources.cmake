target_sources(sluice_torch PRIVATE
  library.cpp accumulate.cpp attention_tensors.cpp cuda.cpp gated_attention.cpp gated_attention_paged.cpp operator.cpp
  prune.cpp quantize.cpp quantize_recurrent.cpp)
if(SLUICE_BUILD_CUDA)
  # libtorch.so brings in libtorch_cuda.so where torch has it, and so the current stream, which is a weak symbol here.
  target_sources(sluice_torch PRIVATE accumulate_cuda.cpp gated_attention_cuda.cpp)
  target_link_libraries(sluice_torch PRIVATE -Wl,--no-as-needed "${SLUICE_TORCH_DIR}/lib/libtorch.so" -Wl,--as-needed)
endif()
