"""What a deployment asks of Ray Serve, without a cluster; the examples have the clusters."""

import pytest

pytest.importorskip("ray.serve", reason="needs the ray extra")
pytestmark = pytest.mark.ray

from runtime.ray import deployment  # noqa: E402


def test_a_replica_has_as_many_requests_as_keep_its_rows_busy():
    made = deployment("nowhere", {"max_batch": 4}, model_id="gemma", replicas=3, max_queue=5)
    assert made.num_replicas == 3
    assert (made.max_ongoing_requests, made.max_queued_requests) == (8, 5)


def test_replicas_are_added_as_requests_wait_for_rows():
    made = deployment("nowhere", model_id=("gemma", "other"), replicas=(1, 3))
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"engine_kwargs": {"max_bach": 4}}, TypeError, "max_batch.*got max_bach"),
        ({"engine_kwargs": {"max_batch": "auto"}}, TypeError, "max_batch must be an integer, got 'auto'"),
        ({"replicas": 0}, ValueError, "replicas must be at least 1, got 0"),
        ({"replicas": (2, 1)}, ValueError, "replicas must be at least 2, got 1"),
        ({"frobnicate": 1}, TypeError, "no setting frobnicate"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments, error, message):
    with pytest.raises(error, match=message):
        deployment("nowhere", model_id="gemma", **arguments)
