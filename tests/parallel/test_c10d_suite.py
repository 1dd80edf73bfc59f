"""A selection of torch's own tests of process groups, on "sluice": one or two of each kind, none that needs a machine
to be fast. `make test-c10d` runs them all, and on gloo too."""

import pytest
from parallel.c10d_suite import Suite, summarize

SELECTION = [
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_Backend_enum_class",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
    "test_all_gather",
    "test_all_gather_coalesced_complex",
    "test_all_gather_coalesced_full_group",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_complex",
    "test_all_gather_group",
    "test_all_gather_object_subgroup",
    "test_all_reduce_coalesced_full_group_max",
    "test_all_reduce_coalesced_group_product",
    "test_all_reduce_coalesced_min",
    "test_all_reduce_coalesced_sum",
    "test_all_reduce_complex_unsupported_ops",
    "test_all_reduce_full_group_product",
    "test_all_reduce_group_min",
    "test_all_reduce_max",
    "test_all_reduce_sum",
    "test_all_reduce_sum_async",
    "test_all_reduce_sum_complex",
    "test_all_to_all",
    "test_all_to_all_group",
    "test_all_to_all_single_equal_split",
    "test_all_to_all_single_unequal_split_complex",
    "test_all_to_all_single_unequal_split_group",
    "test_barrier_group",
    "test_batch_isend_irecv_gloo",
    "test_batch_isend_irecv_gloo_tags",
    "test_broadcast",
    "test_broadcast_group",
    "test_ddp_create_graph",
    "test_destroy_full_group",
    "test_gather_checks",
    "test_gather_group",
    "test_gather_object_subgroup",
    "test_get_backend",
    "test_get_future",
    "test_get_rank_size_group",
    "test_grads_same_across_ranks_with_no_sync",
    "test_irecv",
    "test_isend_torch_profiler",
    "test_monitored_barrier_gloo_rank_0_timeout",
    "test_monitored_barrier_wait_all_ranks",
    "test_new_subgroups_with_group_param",
    "test_reduce_full_group_product",
    "test_reduce_group_sum",
    "test_reduce_max",
    "test_reduce_min",
    "test_scatter_checks",
    "test_scatter_complex",
    "test_scatter_group",
    "test_scatter_object_list",
    "test_send_recv_any_source_torch_profiler",
    "test_send_recv_torch_profiler",
    "test_send_recv_with_tag_autograd_profiler",
    "test_sparse_all_reduce_sum",
    "test_static_graph_api_cpu",
]


@pytest.fixture(scope="module")
def suite():
    suite = Suite(ranks=4, seconds=150)  # a hundred times what the longest takes
    yield suite
    suite.close()


@pytest.mark.parametrize("name", SELECTION)
def test_it_passes(suite, name):
    result = suite.run(name)
    assert result["outcome"] == "passed", (
        f"torch's {name} {result['outcome']}: {summarize(result['reason'])}\n{result['reason']}\n{result['output']}"
    )


def test_a_failure_is_seen_with_its_error(suite):
    result = suite.run("test_get_rank", backend="no_such_backend")
    assert result["outcome"] == "failed"
    assert "no_such_backend" in result["output"]
