"""cluster.toml: what it may say, and the error for everything else."""

from pathlib import Path

import pytest

from edgellm.builder.cluster import LOCAL_CLUSTER, ClusterError, parse_cluster, read_cluster
from edgellm.jetson.profiles import GIB, PROFILES

GOOD = """
[devices.nx0]
class = "orin-nx-16gb"
watts = 40

[devices.nano0]
class = "orin-nano-8gb"
memory_gib = 7.5
bandwidth_gb_s = 60
link_gbit_s = 2.5

[pools]
prefill = ["nx0"]
decode = ["nano0", "nx0"]
"""


def test_profiles_and_overrides_become_rates() -> None:
    cluster = parse_cluster(GOOD)
    nx0, nano0 = cluster.prefill[0], cluster.decode[0]
    assert cluster.decode[1] == nx0
    assert nx0.flops_per_s == pytest.approx(8 * 2048 * 1173e6 * 0.6)
    assert nx0.link_bytes_per_s == pytest.approx(0.94e9 / 8)
    assert nano0.usable_bytes == 6 * GIB
    assert nano0.bytes_per_s == pytest.approx(36e9)
    assert nano0.link_bytes_per_s == pytest.approx(2.5e9 / 8)


def test_one_machine_is_the_default() -> None:
    assert LOCAL_CLUSTER.prefill == LOCAL_CLUSTER.decode
    assert LOCAL_CLUSTER.prefill[0].device_class == "cpu-local"


def test_every_class_of_the_error_message_can_be_used() -> None:
    for name in PROFILES:
        text = f'[devices.a]\nclass = "{name}"\n[pools]\nprefill = ["a"]\ndecode = ["a"]'
        assert parse_cluster(text).prefill[0].device_class == name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"orin-nx-16gb"', '"orin-nx-32gb"', "'orin-nx-32gb'; the known classes are cpu-local, orin-nx-16gb"),
        ("watts = 40", "watts = 30", "watts = 30; the power modes of orin-nx-16gb are 25, 40"),
        (
            "memory_gib = 7.5",
            "memory_gib = 1",
            "'nano0' has 1 GiB of memory; the system alone .* 1.5 GiB",
        ),
        ("bandwidth_gb_s = 60", "bandwidth_gb_s = 0", r"Expected `float` > 0.* at `\$.devices\[...\].bandwidth_gb_s`"),
        ("bandwidth_gb_s", "bandwith", "unknown field `bandwith`"),
        ("watts = 40", 'watts = "fast"', "Expected `int"),
        ('class = "orin-nx-16gb"', "", "missing required field `class`"),
        ('decode = ["nano0", "nx0"]', 'decode = ["nano1"]', r"'nano0' is in no pool|names 'nano1'"),
        ('decode = ["nano0", "nx0"]', 'decode = ["nano0", "x"]', "names 'x'; the devices are nano0, nx0"),
        ('decode = ["nano0", "nx0"]', 'decode = ["nano0", "nano0"]', "names 'nano0' more than once"),
        ('prefill = ["nx0"]', "prefill = []", "pools.prefill is empty"),
        ('decode = ["nano0", "nx0"]', 'decode = ["nx0"]', "'nano0' is in no pool"),
        ('decode = ["nano0", "nx0"]', "", "missing required field `decode`"),
        ("[pools]", "[pools", "line|column|Expected"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ClusterError, match=message):
        parse_cluster(GOOD.replace(old, new))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.toml cannot be read"):
        read_cluster(tmp_path / "cluster.toml")


def test_the_file_is_named_with_its_error(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(GOOD.replace("orin-nx-16gb", "unknown"))
    with pytest.raises(ClusterError, match=r"cluster\.toml: device 'nx0' has class 'unknown'"):
        read_cluster(file)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ClusterError, match="cannot be read"):
        read_cluster(file)
