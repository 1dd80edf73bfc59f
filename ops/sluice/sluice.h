/* Everything that Sluice's C core offers. */
#ifndef SLUICE_SLUICE_H
#define SLUICE_SLUICE_H

#include <sluice/accumulate.h>
#include <sluice/cpu.h>
#include <sluice/cuda.h>
#include <sluice/executor.h>
#include <sluice/gated_attention.h>
#include <sluice/prune.h>
#include <sluice/quantize.h>
#include <sluice/status.h>
#include <sluice/types.h>
#include <sluice/version.h>

#endif
