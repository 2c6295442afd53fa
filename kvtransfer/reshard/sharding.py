"""How a worker's ranks divide a model's KV among them: which layers and kv heads each rank keeps."""

from dataclasses import dataclass, replace

from pdserve.core.errors import ConfigError
from pdserve.kvtransfer.pool.layout import KvLayout

MAX_TENSOR_PARALLEL = 64
"""Bounds the work that a peer's descriptor can ask for; far above what one replica of a model uses."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The indices `first` to `end` without `end`; never empty."""

    first: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.first

    def overlap(self, other: "Span") -> "Span | None":
        """The indices of both; None if there are none."""
        first, end = max(self.first, other.first), min(self.end, other.end)
        return Span(first, end) if first < end else None

    def within(self, outer: "Span") -> "Span":
        """The same indices, counted from the beginning of `outer`, which has them all."""
        return Span(self.first - outer.first, self.end - outer.first)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Layers × kv heads, K and V of each: of the model, or, where it says so, of one rank's blocks."""

    layers: Span
    heads: Span

    @property
    def cells(self) -> int:
        """Number of (layer, kv head)."""
        return self.layers.size * self.heads.size

    def within(self, outer: "Rectangle") -> "Rectangle":
        """The same cells, counted from the corner of `outer`, which has them all."""
        return Rectangle(self.layers.within(outer.layers), self.heads.within(outer.heads))


@dataclass(frozen=True, slots=True)
class Sharding:
    """The part of a worker's representation that says which rank keeps what.

    Ranks are numbered stage by stage: rank = stage * tp + tensor rank. Stage s keeps the `stage_layers[s]`
    layers behind those of the stages before it. Tensor rank r of tp keeps the kv heads that the r-th part of
    the query heads attends to: [⌊r·K / tp⌋, ⌈(r+1)·K / tp⌉) of K. So K divisible by tp is a partition, tp
    divisible by K gives each head to tp / K ranks, and else a head on the border of two ranks is on both.
    """

    num_kv_heads: int
    tp: int
    stage_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises ConfigError, also for what a peer sent."""
        if self.num_kv_heads < 1:
            raise ConfigError(f"a model has at least 1 kv head, the sharding says {self.num_kv_heads}")
        if not 1 <= self.tp <= MAX_TENSOR_PARALLEL:
            raise ConfigError(
                f"tensor parallel size {self.tp} cannot be re-sharded; use 1 to {MAX_TENSOR_PARALLEL}"
            )
        if not self.stage_layers or min(self.stage_layers) < 1:
            raise ConfigError(
                f"every pipeline stage has at least 1 layer, and there is at least 1 stage; "
                f"the sharding says {list(self.stage_layers)} layers"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return sum(self.stage_layers)

    @property
    def num_ranks(self) -> int:
        return len(self.stage_layers) * self.tp

    def heads_of(self, tensor_rank: int) -> Span:
        """The kv heads of one tensor rank, in every stage. Neither end falls from one rank to the next."""
        first = tensor_rank * self.num_kv_heads // self.tp
        return Span(first, -(-(tensor_rank + 1) * self.num_kv_heads // self.tp))

    def layers_of(self, stage: int) -> Span:
        """The layers of one stage."""
        first = sum(self.stage_layers[:stage])
        return Span(first, first + self.stage_layers[stage])

    def kept_by(self, rank: int) -> Rectangle:
        """What a rank keeps of every block. Raises ConfigError for a rank that does not exist."""
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(
                f"rank {rank} does not exist; this sharding has ranks 0 to {self.num_ranks - 1}"
            )
        stage, tensor_rank = divmod(rank, self.tp)
        return Rectangle(self.layers_of(stage), self.heads_of(tensor_rank))

    def layout_of(self, rank: int, model: KvLayout) -> KvLayout:
        """The layout of a rank's pool, given that of a pool that keeps the whole model.

        Raises ConfigError where `model` is another model's.
        """
        if (model.num_layers, model.num_kv_heads) != (self.num_layers, self.num_kv_heads):
            raise ConfigError(
                f"the layout has {model.num_layers} layers and {model.num_kv_heads} kv heads, "
                f"the sharding divides {self.num_layers} and {self.num_kv_heads}"
            )
        kept = self.kept_by(rank)
        return replace(model, num_layers=kept.layers.size, num_kv_heads=kept.heads.size)
