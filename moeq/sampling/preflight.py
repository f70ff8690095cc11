"""What writing a calibration set is going to take, by who writes it.

    original    the whole model, with the caches of the rows that are written at once
    lockstep    the whole model in main memory; two blocks and the caches on the device
    packed8, 4  the model rounded to few bits, a block that is being rounded, and the caches

    time        chunks of sequences * tokens of a sequence * blocks * seconds of one token of every row in one block

The seconds are those of the dense block, so a model that is rounded takes longer, and so do sequences drawn again.
"""

from moeq.preflight.phases import Moment, Phase
from moeq.sampling.ebss_spec import EBSSSpec
from moeq.sampling.writer import BITS, Writer, WriterSizes

KIND, LABEL = "sampling", "calibration data"


def sampling_phase(
    sizes: WriterSizes, writer: Writer, spec: EBSSSpec, *, sequences_at_once: int, num_blocks: int, step: float | None
) -> Phase:
    """The phase in which a set is written.

    Args:
        sizes: Of the model and of what is written at once.
        writer: Who writes.
        spec: Of the search.
        sequences_at_once: Sequences of a chunk.
        num_blocks: Of the model.
        step: Seconds of one token of every row in one block; None where nothing was measured.
    """
    caches = {"caches": sizes.work}
    if writer in BITS:
        moment = Moment({"writer": sizes.packed[writer], "block": sizes.block, **caches})
    elif writer == "lockstep":
        moment = Moment({"block": 2 * sizes.block, **caches}, {"writer": sizes.original})
    else:
        moment = Moment({"writer": sizes.original, **caches})
    chunks = -(-spec.num_sequences // sequences_at_once)
    seconds = None if step is None else chunks * spec.length * num_blocks * step
    return Phase(KIND, LABEL, (moment,), disk=spec.num_sequences * spec.length * 8, seconds=seconds)
