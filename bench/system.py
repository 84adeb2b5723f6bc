"""The whole system: an orchestrator, a prefill node and a decode node, each a process, under 1, 4 and 16 clients.

With `--peers`, requests arrive at random instead, and other servers are asked the same: see `serving/`. Without:

Every cell of the table is `rounds` rounds of so many simultaneous requests with random prompts; TTFT and TPOT are what
a client saw, over all its requests; tokens per second are those of a whole round, prompts included in its time.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.report import Report, Target, machine
from bench.serving import comparison
from edgellm.orchestrator.local_cluster import serve
from edgellm.runtime.rpc import inference_pb2 as api
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

CLIENTS = (1, 4, 16)
PROMPT_TOKENS = (128, 512, 2048)
ANSWER_TOKENS = 64
TOKEN_IDS = range(300, 500)
"""Of the random prompts: any vocabulary has them, past its special tokens."""
EXPOSED_SHARE_TARGET = 0.1
"""Of the TTFT, at one client: sending is meant to hide behind computing."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One request as its client saw it."""

    ttft_ms: float
    tpot_ms: float
    kv: api.KvTransfer
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Medians over the requests of one combination, and the 99th percentiles where a tail matters."""

    clients: int
    prompt_tokens: int
    ttft_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    tpot_p99_ms: float
    tokens_per_s: float
    kv_transport: str
    kv_bytes: int
    kv_hidden_ms: float
    kv_exposed_ms: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path(".demo/smollm2-135m"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="per cell, after one that does not count (%(default)s)")
    comparison.add_arguments(parser)


def run(options: argparse.Namespace) -> Report:
    """Raises ClusterStartError, and grpc.RpcError if a request fails: then there is nothing to report."""
    if options.peers:
        return comparison.run(options)
    cells, differing = [], 0
    with serve(options.bundle) as cluster, cluster.client() as stub:
        for prompt_tokens in PROMPT_TOKENS:
            for clients in CLIENTS:
                rounds = list(_rounds(stub, clients, prompt_tokens, options.rounds))
                cells.append(_cell(clients, prompt_tokens, rounds))
                differing += _differing([observations for _, observations in rounds])
    return Report(
        name="system",
        machine=machine(),
        results=[asdict(cell) for cell in cells],
        targets=[_no_difference(differing), *(_hidden(cell) for cell in cells if cell.clients == 1)],
    )


def _rounds(
    stub: InferenceStub, clients: int, prompt_tokens: int, rounds: int
) -> Iterator[tuple[float, list[Observation]]]:
    """Seconds and observations of each round; the same prompts in every round."""
    chance = random.Random(1000 * clients + prompt_tokens)
    prompts = [chance.choices(TOKEN_IDS, k=prompt_tokens) for _ in range(clients)]
    with ThreadPoolExecutor(clients) as threads:
        for number in range(rounds + 1):
            started_s = time.perf_counter()
            observations = list(threads.map(lambda prompt: _observe(stub, prompt), prompts))
            if number > 0:
                yield time.perf_counter() - started_s, observations


def _observe(stub: InferenceStub, prompt: Sequence[int]) -> Observation:
    request = api.GenerateRequest(token_ids=api.TokenIds(ids=prompt), max_tokens=ANSWER_TOKENS, ignore_eos=True)
    started_s = time.perf_counter()
    arrivals_s, token_ids, finished = [], [], api.Finished()
    for reply in stub.Generate(request, timeout=300):
        match reply.WhichOneof("event"):
            case "token":
                arrivals_s.append(time.perf_counter())
                token_ids.append(reply.token.token_id)
            case "finished":
                finished = reply.finished
    return Observation(
        ttft_ms=1e3 * (arrivals_s[0] - started_s),
        tpot_ms=1e3 * (arrivals_s[-1] - arrivals_s[0]) / (len(arrivals_s) - 1),
        kv=finished.kv,
        token_ids=tuple(token_ids),
    )


def _cell(clients: int, prompt_tokens: int, rounds: Sequence[tuple[float, list[Observation]]]) -> Cell:
    seen = [observation for _, observations in rounds for observation in observations]
    return Cell(
        clients=clients,
        prompt_tokens=prompt_tokens,
        ttft_ms=statistics.median(o.ttft_ms for o in seen),
        ttft_p99_ms=_p99([o.ttft_ms for o in seen]),
        tpot_ms=statistics.median(o.tpot_ms for o in seen),
        tpot_p99_ms=_p99([o.tpot_ms for o in seen]),
        tokens_per_s=statistics.median(clients * ANSWER_TOKENS / seconds for seconds, _ in rounds),
        kv_transport=seen[0].kv.transport,
        kv_bytes=seen[0].kv.bytes,
        kv_hidden_ms=statistics.median(o.kv.hidden_ms for o in seen),
        kv_exposed_ms=statistics.median(o.kv.exposed_ms for o in seen),
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


def _differing(rounds: Sequence[Sequence[Observation]]) -> int:
    """Requests whose tokens are not those of the same prompt in the first round."""
    return sum(
        observation.token_ids != first.token_ids
        for observations in rounds
        for observation, first in zip(observations, rounds[0], strict=True)
    )


def _no_difference(differing: int) -> Target:
    return Target(name="answers that differ between rounds", value=differing, target=0, met=differing == 0)


def _hidden(cell: Cell) -> Target:
    share = cell.kv_exposed_ms / cell.ttft_ms
    return Target(
        name=f"exposed transfer as a share of TTFT, {cell.prompt_tokens} tokens, 1 client",
        value=share,
        target=EXPOSED_SHARE_TARGET,
        met=share <= EXPOSED_SHARE_TARGET,
    )
