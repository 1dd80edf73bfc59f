/* Everything that Sluice's C core offers.
 *
 * OF EVERY OPERATOR sluice::..., whatever its family: a tensor argument must be there, unless its type is Tensor?, be
 * dense (torch.strided), and be on a device that the operator has kernels for: the CPU, and CUDA where cuda.h says so.
 * Else it raises SL_INVALID_ARGUMENT's exception, which names the argument. A call that succeeds raises the version
 * counter of each tensor that its schema marks as written, (a!), by one; a call that fails raises none.
 */
#ifndef SLUICE_SLUICE_H
#define SLUICE_SLUICE_H

#include <sluice/accumulate.h>
#include <sluice/balance.h>
#include <sluice/cpu.h>
#include <sluice/cuda.h>
#include <sluice/executor.h>
#include <sluice/gated_attention.h>
#include <sluice/plan.h>
#include <sluice/plan_search.h>
#include <sluice/prune.h>
#include <sluice/quantize.h>
#include <sluice/quantize_recurrent.h>
#include <sluice/schedule.h>
#include <sluice/status.h>
#include <sluice/types.h>
#include <sluice/version.h>

#endif
