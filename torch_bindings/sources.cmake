target_sources(sluice_torch PRIVATE library.cpp gated_attention.cpp)
