target_sources(sluice_objects PRIVATE
  comm/reduce_validate.c)
