target_sources(sluice_objects PRIVATE plan/schedule.c plan/schedule_validate.c)
target_sources(sluice_objects PRIVATE plan/simulate.c plan/simulate_validate.c)
target_sources(sluice_objects PRIVATE plan/balance_validate.c plan/cut.c plan/share.c)
target_sources(sluice_objects PRIVATE plan/collective.c plan/layer.c plan/memory.c plan/operator.c plan/predict.c
  plan/search.c plan/validate.c)
