target_sources(sluice_objects PRIVATE attention/gated_attention.c attention/reference.c attention/validate.c)
