"""Results of the engine benchmark as they would be measured."""

from bench.busy import CpuShares
from bench.comparison import Compared
from bench.installed_code import Conditions
from bench.loading import KV_TOKENS
from bench.machine_limits import Peaks
from bench.pairs import Pairing, Round, Scenario
from bench.peers.contenders import PEERS
from bench.peers.models import MODELS

PEAKS = Peaks(fp32=500, bf16=1000, int8=2000)
CONDITIONS = Conditions(cpu="a processor", threads=2, real_time=True, backend_version="cpu-0")
WEIGHT_BYTES = 700_000_000
LARGE = MODELS["1.1b"]
RSS_MIB = (WEIGHT_BYTES + KV_TOKENS * LARGE.kv_bytes_per_token) / 2**20 + 50


def compared(
    scenario: Scenario,
    ours_s: float,
    peer_s: float,
    *,
    peer: int = 0,
    reads: tuple[float, float] = (10, 20),
    model: str = "1.1b",
    measured_at: str = "2026-01-01 10:00",
) -> Compared:
    shares = CpuShares(others=0.01, stolen=0)
    one = Round(ours_s=ours_s, peer_s=peer_s, read_1_gb_per_s=reads[0], read_2_gb_per_s=reads[1], shares=shares)
    return Compared(
        model=MODELS[model],
        scenario=scenario,
        peer=PEERS[peer],
        pairing=Pairing(scenario=scenario, steps=10, rounds=(one,) * 5),
        reason="",
        scheduler="SCHED_RR 5",
        ours_name="EdgeLLM INT4",
        ours_weight_bytes=WEIGHT_BYTES,
        ours_load_s=0.1,
        ours_rss_mib=RSS_MIB,
        peer_load_s=2.0,
        peer_rss_mib=900,
        peaks=PEAKS,
        measured_at=measured_at,
        conditions=CONDITIONS,
        kernels_sha256="",
    )
