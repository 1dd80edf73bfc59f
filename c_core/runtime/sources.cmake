target_sources(sluice_objects PRIVATE runtime/cpu.c runtime/executor.c runtime/status.c)
