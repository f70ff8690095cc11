"""Who writes the calibration data: the model itself, or itself rounded to few bits where it does not fit.

    original    the model as it is, whole on the device
    lockstep    the same numbers from blocks that wait on the host and visit the device in turn, for all rows together
    packed8     the model rounded to 8 bits in memory, routers exact (``moeq.checkpoint.packed_self``)
    packed4     likewise to 4 bits

Sequences are drawn token by token, so a writer needs every block at every step: this is the one thing that blocks read
from files cannot do in time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moeq.quant.spec import Fallback

Writer = Literal["original", "lockstep", "packed8", "packed4"]
WriterChoice = Literal["auto", "original", "lockstep", "packed8", "packed4"]
BITS: dict[Writer, int] = {"packed8": 8, "packed4": 4}
WRITERS: tuple[Writer, ...] = get_args(Writer)
_MEASURED = (
    "on the bundled model a 3-bit fit then diverges by {} thousandths of a nat, by 47.8 +- 0.6 on what the original "
    "writes (benchmarks/results/writers_reference.md)"
)
# What a set costs that was not written by the original itself, of five seeds.
PRICE: dict[Writer, str] = {"packed8": _MEASURED.format("48.1 +- 0.3"), "packed4": _MEASURED.format("48.3 +- 0.7")}
_GIB = 1 << 30


@dataclass(frozen=True)
class WriterSizes:
    """Bytes that decide who writes.

    Attributes:
        original: The whole model as it computes.
        packed: The model of each packed writer.
        block: Its largest block, dense.
        work: Caches, logits and search of the rows that are written at once.
        device_free: Free on the device.
        host_free: Free in main memory.
        on_host: The device is the CPU, so both are the same memory.
    """

    original: int
    packed: dict[Writer, int]
    block: int
    work: int
    device_free: int
    host_free: int
    on_host: bool


def choose_writer(sizes: WriterSizes) -> Writer:
    """The first writer of the list that fits.

    Raises:
        ValueError: None does; it names the numbers.
    """
    if sizes.original + sizes.work <= sizes.device_free:
        return "original"
    # Two blocks: the next one is copied while one computes.
    if not sizes.on_host and sizes.original <= sizes.host_free and 2 * sizes.block + sizes.work <= sizes.device_free:
        return "lockstep"
    for writer, packed in sizes.packed.items():
        if packed + sizes.block + sizes.work <= sizes.device_free:
            return writer
    packed = min(sizes.packed.values())
    raise ValueError(
        f"the model cannot write its calibration data here: rounded to 4 bits it takes {_gib(packed)}, a block that is "
        f"being rounded {_gib(sizes.block)} and the caches of its rows {_gib(sizes.work)}, and "
        f"{_gib(sizes.device_free)} are free; choose a smaller sequences_at_once, or give token ids that were written "
        "elsewhere (--data GivenIdsDataModule)"
    )


def settle_writer(
    sizes: WriterSizes, *, finished: Sequence[Writer], begun: Sequence[Writer], shared: Sequence[Writer]
) -> Writer:
    """Who writes, where files may tell of earlier runs: a run keeps its writer, and no set is written twice.

    Args:
        sizes: Decide where no file does.
        finished: Writers whose whole set is in the run folder, as all lists in the order of the writers.
        begun: Those of which parts are there.
        shared: Those whose whole set is in the folder that runs share; taken where it is as good as a new one.

    Raises:
        ValueError: Nothing is there, and no writer fits.
    """
    if finished:
        return finished[0]
    if rounded := [writer for writer in begun if writer in BITS]:
        return rounded[0]
    try:
        chosen = choose_writer(sizes)
    except ValueError:
        if not shared:
            raise
        return shared[0]
    good = (writer for writer in shared if WRITERS.index(writer) <= WRITERS.index(chosen))
    return next(good, chosen)


def describe_writer(writer: Writer, sizes: WriterSizes) -> str:
    """Who writes and why, in a sentence."""
    rooms = f"{_gib(sizes.original)} and {_gib(sizes.work)} of caches, {_gib(sizes.device_free)} free"
    if writer == "original":
        return f"EBSS: the model writes whole ({rooms}); its blocks leave again before the first pass"
    if writer == "lockstep":
        return f"EBSS: the model writes from main memory, its blocks visit the device in turn ({rooms} there)"
    return f"EBSS: the model writes rounded to {BITS[writer]} bits, as it does not fit ({rooms}); {PRICE[writer]}"


def rounded_fallback(writer: Writer) -> Fallback:
    """What the report says of a set that was not written by the original."""
    return Fallback("calibration data", f"written by the model rounded to {BITS[writer]} bits", PRICE[writer])


def identity_of(writer: Writer) -> str:
    """What a set's fingerprint says of its writer; blocks in lockstep are the original."""
    return "original" if writer == "lockstep" else writer


def work_bytes(config: Any, rows: int, length: int, itemsize: int) -> int:
    """Bytes of a search beside the model: keys and values of every block, and two sets of log-probabilities.

    An upper bound where blocks keep less (linear attention, sliding windows).

    Args:
        config: Of the text model.
        rows: Sequences at once times branches.
        length: Tokens of a sequence.
        itemsize: Bytes of a number that the model computes.
    """
    cached = rows * length * config.num_hidden_layers * _cached_numbers(config) * itemsize
    return cached + rows * config.vocab_size * (2 * 4 + itemsize)


def _cached_numbers(config: Any) -> int:
    """Numbers that a block of full attention keeps of a token."""
    if latent := getattr(config, "kv_lora_rank", None):
        return int(latent + config.qk_rope_head_dim + (getattr(config, "index_head_dim", None) or 0))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads * (size + (getattr(config, "v_head_dim", None) or size)))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
