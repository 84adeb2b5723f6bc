"""The processes of a simulated cluster: nodes with toy engines and an orchestrator, as they are started for real."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgellm.engines.kv import HostKvPool
from edgellm.engines.spec import EngineSpec, Phase
from edgellm.orchestrator.bundle import ServedBundle, open_bundle
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.journal import Written
from edgellm.orchestrator.server import Orchestrator, core_config, run_orchestrator
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.orchestrator.sim.disk import SimulatedJournal
from edgellm.orchestrator.sim.loop import KERNEL, Process, SimulatedLoop, spend
from edgellm.orchestrator.sim.network import Network
from edgellm.orchestrator.sim.toy import MAX_SEQ_LEN, VOCAB_SIZE, Spend, ToyEngine, toy_contract, toy_spec
from edgellm.runtime.config import JoinConfig, NodeConfig, NodeError
from edgellm.runtime.kv.types import NodeId
from edgellm.runtime.loading import NodeEngines
from edgellm.runtime.server import NodeServer
from edgellm.runtime.stages.engines import StageEngines

END_TOKEN = VOCAB_SIZE - 1
LEASE_S = 8.0
"""For which nodes keep what nobody claims, and look for a lost orchestrator."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def toy_bundle(folder: Path, num_layers: int, num_stages: int = 1) -> ServedBundle:
    """A bundle without engines, cut into equal stages. Its tokenizer has a token per byte, and an end token."""
    contract = toy_contract(num_layers)
    index = {
        "schema_version": 1,
        "model": {
            "id": "toy",
            "architecture": "llama",
            "vocab_size": VOCAB_SIZE,
            "max_seq_len": MAX_SEQ_LEN,
            "num_layers": num_layers,
            "bos_token_id": None,
            "eos_token_ids": [END_TOKEN],
        },
        "kv": {
            "num_layers": num_layers,
            "kv_heads": contract.kv_heads,
            "head_dim": contract.head_dim,
            "dtype": contract.dtype,
            "block_tokens": contract.block_tokens,
        },
        "engines": [],
        "plan": {
            "placements": [_placement(spec) for spec in _specs(num_layers, num_stages)],
            "predicted_ttft_ms": 1.0,
            "predicted_tpot_ms": 1.0,
        },
        "quality": None,
    }
    folder.mkdir(exist_ok=True)
    (folder / "bundle.json").write_bytes(msgspec.json.encode(index))
    _write_tokenizer(folder / "tokenizer")
    return open_bundle(folder)


def _specs(num_layers: int, num_stages: int) -> list[EngineSpec]:
    """The whole model in half precision, and the decode stages."""
    depth = num_layers // num_stages
    stages = [range(first, first + depth) for first in range(0, num_layers, depth)]
    return [
        toy_spec("prefill", range(num_layers), num_layers),
        *(toy_spec("decode", layers, num_layers) for layers in stages),
    ]


def _placement(spec: EngineSpec) -> dict[str, object]:
    return {
        "engine": spec.name,
        "device": spec.name,
        "device_class": spec.device_class,
        "role": spec.phase,
        "first_layer": spec.first_layer,
        "num_layers": spec.num_layers,
    }


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token_id": None, "eos_token_ids": [END_TOKEN], "bos_token": "", "eos_token": "<end>"}
    (folder / "generation.json").write_bytes(msgspec.json.encode(defaults))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """One node to be."""

    name: str
    engine: str
    """Such as `prefill-tp0of1` or `decode-pp1of2`: its phase, its stage and their number."""
    device: DeviceModel
    kv_blocks: int
    half: bool = True
    """Whether a decode node has the half-precision engine as well."""
    max_sequences: int = 64
    spare: bool = False

    @property
    def phase(self) -> Phase:
        return "prefill" if self.engine.startswith("prefill") else "decode"


def toy_engines(plan: NodePlan, bundle: ServedBundle, spend: Spend) -> NodeEngines:
    """What `load_engines` would load, had the bundle engines."""
    num_layers, num_stages = bundle.index.model.num_layers, len(bundle.index.plan.stages)
    pool = HostKvPool(toy_contract(num_layers), range(num_layers), plan.kv_blocks)

    def engine(spec: EngineSpec) -> ToyEngine:
        limits = dataclasses.replace(spec.limits, max_sequences=plan.max_sequences)
        return ToyEngine(dataclasses.replace(spec, limits=limits), pool, plan.device, spend)

    half, *stages = map(engine, _specs(num_layers, num_stages))
    return NodeEngines(
        bundle_sha256=bundle.sha256,
        contract=pool.contract,
        role=plan.phase,
        planned=plan.engine,
        half=half if plan.half or plan.phase == "prefill" else None,
        stages=StageEngines(stages, pool),
    )


def node_config(plan: NodePlan, bundle: ServedBundle, orchestrator: str) -> NodeConfig:
    return NodeConfig(
        node_id=NodeId(plan.name),
        bundle=bundle.folder,
        engine=plan.engine,
        join=JoinConfig(orchestrator=orchestrator, lease_s=LEASE_S),
        spare=plan.spare,
        allow_shm=False,
    )


class Machine:
    """Runs one program, as a service manager would: again and again, each time in a new process."""

    RESTART_S = 0.3

    def __init__(self, loop: SimulatedLoop, network: Network, name: str) -> None:
        self.name = name
        self.process: Process | None = None
        self.history: list[Process] = []
        self.wall_clock_jump_s = 0.0
        """By which the machine's clock of the day is wrong."""
        self._loop = loop
        self._network = network
        network.port_of(name)

    async def main(self) -> None:
        """The program."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._network.port_of(self.name)}"

    def start(self) -> None:
        """A new process, with nothing of an earlier one. Without effect while it runs."""
        if self.process is None:
            self.process = Process(
                name=self.name, pid=1000 + 1000 * self._network.port_of(self.name) + len(self.history)
            )
            self.process.wall_clock_jump_s = self.wall_clock_jump_s
            self.history.append(self.process)
            task = self._loop.spawn(self.process, self.main())
            process = self.process
            task.add_done_callback(lambda task: self._ended(process, task), context=self.process.context)

    def kill(self) -> None:
        """SIGKILL; it is started again by `start`."""
        if self.process is not None:
            self._loop.kill(self.process)
            self._network.process_died(self.process)
            self.process = None

    def _ended(self, process: Process, task: "asyncio.Task[None]") -> None:
        if self.process is not process or task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, NodeError):
            self._loop.call_exception_handler({"message": f"{self.name} crashed", "exception": error})
        self.kill()
        self._loop.call_later(self.RESTART_S, self.start, context=KERNEL)


class SimulatedNode(Machine):
    def __init__(
        self, loop: SimulatedLoop, network: Network, plan: NodePlan, bundle: ServedBundle, orchestrator: str
    ) -> None:
        super().__init__(loop, network, plan.name)
        self.plan = plan
        self.server: NodeServer | None = None
        self.out_of_memory = False
        self._bundle = bundle
        self._config = node_config(plan, bundle, orchestrator)

    async def main(self) -> None:
        engines = toy_engines(self.plan, self._bundle, self._spend)
        self.server = NodeServer(self._config, engines)
        await self.server.run()

    def kill(self) -> None:
        super().kill()
        self.server = None

    def _spend(self, seconds: float, effect: Callable[[], None]) -> None:
        if self.out_of_memory:
            raise ValueError("out of memory")
        spend(seconds, effect)


class SimulatedOrchestrator(Machine):
    """Keeps a journal in `journal_folder`, where one is given."""

    def __init__(
        self,
        loop: SimulatedLoop,
        network: Network,
        bundle: ServedBundle,
        policy: Callable[[], Policy],
        bounds: Mapping[str, float],
        watch: Callable[[Orchestrator], None],
    ) -> None:
        super().__init__(loop, network, "orchestrator")
        self.journal_folder: Path | None = None
        self._journal: SimulatedJournal | None = None
        self._bundle = bundle
        self._policy = policy
        self._bounds: Mapping[str, Any] = bounds
        self._watch = watch

    async def main(self) -> None:
        config = dataclasses.replace(core_config(self._bundle), **self._bounds)
        written, epoch = list[Written](), 0
        if self.journal_folder is not None:
            self._journal = SimulatedJournal(self.journal_folder / "journal", self._bundle.sha256, self._loop)
            written, epoch = self._journal.file.read(), self._journal.file.epoch()
        config = dataclasses.replace(config, first_epoch=max(config.first_epoch, epoch))
        async with run_orchestrator(
            self._bundle, config, self._policy(), "127.0.0.1:0", journal=self._journal, written=written
        ) as running:
            self._watch(running)
            await self._loop.create_future()

    def kill(self) -> None:
        super().kill()
        if self._journal is not None:
            self._journal.file.close()
            self._journal = None
