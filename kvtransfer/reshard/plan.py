"""The one function that says which rank of P sends what of a block to which rank of D."""

from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.reshard.replicas import assign_heads
from pdserve.kvtransfer.reshard.sharding import Rectangle, Sharding


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """Where a part of a block lies: `count` runs of `length` bytes, their beginnings `stride` bytes apart."""

    offset: int
    length: int
    stride: int
    count: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one rank of P sends to one rank of D, of each block; the only transfer between the two.

    Block ids are equal on all ranks of a worker, so a grant's block pairs hold for all transfers of its plan.
    The bytes travel in the order [block, layer, K|V, kv head, token, dim], whatever lies around them.
    """

    source: int
    """Rank of P."""
    destination: int
    """Rank of D."""
    part: Rectangle
    """In the model's layers and heads."""
    source_part: Rectangle
    """The same, within the blocks of P's rank."""
    destination_part: Rectangle
    """The same, within the blocks of D's rank."""


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Every transfer that brings a block from P to D, by first layer, then by source, then by destination."""

    source: Sharding
    destination: Sharding
    transfers: tuple[Transfer, ...]

    def into(self, destination: int) -> tuple[Transfer, ...]:
        """What a rank of D fetches; its blocks are whole when all of these have landed."""
        return tuple(transfer for transfer in self.transfers if transfer.destination == destination)

    def out_of(self, source: int) -> tuple[Transfer, ...]:
        """What a rank of P sends; it is done after as many completions. Empty for a replica not needed."""
        return tuple(transfer for transfer in self.transfers if transfer.source == source)


def plan_transfer(source: Sharding, destination: Sharding) -> TransferPlan:
    """Who sends what to whom: a function of the two descriptors alone, so both sides compute the same plan.

    - Every (layer, kv head) of every rank of D is written once, from a rank of P that keeps it.
    - One transfer per pair of ranks, at most (P_tp + D_tp - 1) × (P stages + D stages - 1) in all; equal
      shardings give rank r to rank r, whole blocks.
    - Fair: in every layer, the loads of P's ranks (heads sent) in descending order are the lexicographically
      least that any choice of replicas has. So the busiest rank sends as little as can be, and no head can
      move to a rank that sends two heads less. The choice is the same in all layers.
    - Near: of the fair choices, one with the least sum over heads of |(p + ½) / P_tp - (d + ½) / D_tp|.

    To be computed once per pair of workers that meet, not per request. Raises ConfigError where the two do
    not divide the same layers and heads.
    """
    ours, theirs = (
        (source.num_layers, source.num_kv_heads),
        (destination.num_layers, destination.num_kv_heads),
    )
    if ours != theirs:
        raise ConfigError(
            f"P divides {ours[0]} layers and {ours[1]} kv heads, D {theirs[0]} and {theirs[1]}: "
            "only workers of one model exchange KV"
        )
    runs = assign_heads(source, destination)
    transfers: list[Transfer] = []
    for source_stage in range(len(source.stage_layers)):
        for destination_stage in range(len(destination.stage_layers)):
            layers = source.layers_of(source_stage).overlap(destination.layers_of(destination_stage))
            if layers is None:
                continue
            for run in runs:
                sender = source_stage * source.tp + run.source
                receiver = destination_stage * destination.tp + run.destination
                part = Rectangle(layers, run.heads)
                transfers.append(
                    Transfer(
                        sender,
                        receiver,
                        part,
                        source_part=part.within(source.kept_by(sender)),
                        destination_part=part.within(destination.kept_by(receiver)),
                    )
                )
    return TransferPlan(source, destination, tuple(transfers))


def byte_runs(part: Rectangle, layout: KvLayout) -> ByteRuns:
    """Where `part` of a rank's block lies in it, in the order of travel; one run where it has all heads.

    `part` counts from the rank's own first layer and head, `layout` is that of its pool. Raises ConfigError
    where the part is not within the block.
    """
    if part.layers.end > layout.num_layers or part.heads.end > layout.num_kv_heads:
        raise ConfigError(
            f"{part} is not within a block of {layout.num_layers} layers and {layout.num_kv_heads} kv heads"
        )
    row = layout.num_kv_heads * layout.segment_bytes
    offset = part.layers.first * 2 * row + part.heads.first * layout.segment_bytes
    length, count = part.heads.size * layout.segment_bytes, part.layers.size * 2
    if length == row:
        return ByteRuns(offset, length * count, length * count, 1)
    return ByteRuns(offset, length, row, count)
