"""What `edgellm status` is told of the nodes."""

from edgellm.orchestrator.cluster_status import nodes_to_proto
from tests.orchestrator.stories import D0, D1, PREFILL, SPARE, Cluster


def roles(cluster):
    return {node.node_id: (node.role, node.layers) for node in nodes_to_proto(cluster.core.state, cluster.now_s)}


def test_a_spare_is_called_so_until_it_stands_in():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    assert roles(cluster) == {
        "p": ("prefill", ""),
        "d0": ("decode", "0-1"),
        "d1": ("decode", "2-3"),
        "spare": ("spare", ""),
    }
    cluster.dies(D1)
    assert roles(cluster)["spare"] == ("decode (spare)", "2-3")
