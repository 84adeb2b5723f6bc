"""Writes a graph op by op: each method appends one op and returns the tensor that it makes."""

from edgellm.builder.models.config import ModelConfig
from edgellm.builder.models.rope import frequencies
from edgellm.engines.graph import (
    TOKENS,
    Activation,
    Add,
    Attention,
    Embed,
    Graph,
    Half,
    Linear,
    Norm,
    Op,
    Rope,
    SelectRows,
    TensorName,
    WeightName,
    check,
)


class GraphWriter:
    """Appends ops for one model.

    A `module` is a Hugging Face module's name; its weights are called `<module>.weight` and `<module>.bias`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._ops: list[Op] = []
        self._inv_freq, self._attention_factor = frequencies(config.rope)

    def _append(self, op: Op) -> TensorName:
        self._ops.append(op)
        return op.out

    def embed(self, module: str) -> TensorName:
        """[rows, hidden_size] from the graph's tokens."""
        return self._append(
            Embed(
                out=TensorName("embedding"),
                tokens=TOKENS,
                weight=_weight(module),
                vocab_size=self._config.vocab_size,
                hidden_size=self._config.hidden_size,
                precision=Half(),
            )
        )

    def rms_norm(self, out: str, module: str, x: TensorName) -> TensorName:
        """RMSNorm of x [rows, hidden_size]."""
        size, eps = self._config.hidden_size, self._config.norm_eps
        return self._append(
            Norm(out=TensorName(out), x=x, kind="rms", weight=_weight(module), bias=None, size=size, eps=eps)
        )

    def layer_norm(self, out: str, module: str, x: TensorName) -> TensorName:
        """LayerNorm of x [rows, hidden_size], with bias."""
        size, eps = self._config.hidden_size, self._config.norm_eps
        return self._append(
            Norm(out=TensorName(out), x=x, kind="layer", weight=_weight(module), bias=_bias(module), size=size, eps=eps)
        )

    def linear(self, out: str, module: str, x: TensorName, *, sizes: tuple[int, int], bias: bool) -> TensorName:
        """A half-precision linear of sizes (in_features, out_features)."""
        return self._append(
            Linear(
                out=TensorName(out),
                x=x,
                weight=_weight(module),
                bias=_bias(module) if bias else None,
                in_features=sizes[0],
                out_features=sizes[1],
                precision=Half(),
            )
        )

    def rope(self, out: str, x: TensorName, *, num_heads: int) -> TensorName:
        """x [rows, num_heads * head_dim], rotated as the config says."""
        return self._append(
            Rope(
                out=TensorName(out),
                x=x,
                num_heads=num_heads,
                head_dim=self._config.head_dim,
                inv_freq=self._inv_freq,
                attention_factor=self._attention_factor,
            )
        )

    def attention(self, out: str, layer: int, q: TensorName, k: TensorName, v: TensorName) -> TensorName:
        """RoPE on q and k, then attention with the usual scale 1 / sqrt(head_dim)."""
        config = self._config
        return self._append(
            Attention(
                out=TensorName(out),
                q=self.rope(f"{q}.rope", q, num_heads=config.num_heads),
                k=self.rope(f"{k}.rope", k, num_heads=config.kv_heads),
                v=v,
                layer=layer,
                num_heads=config.num_heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                scale=config.head_dim**-0.5,
            )
        )

    def activation(self, out: str, x: TensorName, *, up: TensorName | None) -> TensorName:
        """The config's activation of x [rows, intermediate_size], gated where `up` is given."""
        config = self._config
        return self._append(
            Activation(out=TensorName(out), x=x, up=up, kind=config.activation, size=config.intermediate_size)
        )

    def add(self, out: str, a: TensorName, b: TensorName) -> TensorName:
        """a + b, both [rows, hidden_size]."""
        return self._append(Add(out=TensorName(out), a=a, b=b, size=self._config.hidden_size))

    def select_rows(self, x: TensorName) -> TensorName:
        """The rows of x [rows, hidden_size] whose logits are wanted."""
        return self._append(SelectRows(out=TensorName("selected"), x=x, size=self._config.hidden_size))

    def head(self, module: str, x: TensorName) -> TensorName:
        """Logits; a tied model names its embedding's module here."""
        sizes = (self._config.hidden_size, self._config.vocab_size)
        return self.linear("logits", module, x, sizes=sizes, bias=False)

    def graph(self, output: TensorName) -> Graph:
        """The finished, checked graph."""
        config = self._config
        graph = Graph(
            ops=tuple(self._ops),
            input=TOKENS,
            output=output,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
        )
        check(graph)
        return graph


def _weight(module: str) -> WeightName:
    return WeightName(f"{module}.weight")


def _bias(module: str) -> WeightName:
    return WeightName(f"{module}.bias")
