"""Which exact codec gets hidden states over a worker's own link the fastest: learnt from the bodies themselves. Pure.

What a body took is what its packing took and its way to the broker, until that confirmed it. No bandwidth is asked for:
the same bytes through a fast and a slow link differ by nothing but these seconds. How codecs work is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: As `--codec auto` names them; both are exact, so that it never changes what a model says.
RAW, LOSSLESS = "raw", "lossless"

#: What a new observation counts against the mean of those before it.
FRESH = 0.2
#: One that took so many times the mean, as while the broker blocks, counts as that many.
MOST_TIMES = 4.0
#: Of every size, so many bodies try both in turn; from then on the slower one gets one of so many, for links change.
TRIALS, RETRY_EVERY = 6, 32
#: Packing is faster by so little that the peer's unpacking costs more (lossless: 1,460 MB/s in, 2,150 out).
UNPACKING = 0.7


@dataclass(slots=True)
class _Size:
    """Bodies whose tensors are about as large: the mean seconds of each codec, and how many were chosen for."""

    seconds: dict[str, float] = field(default_factory=dict)
    chosen: int = 0


@dataclass(slots=True)
class CodecChoice:
    """`choose` before a tensor is packed, `note` when its body is out."""

    #: By the power of two of their bytes: a codec pays from some size on.
    _sizes: dict[int, _Size] = field(default_factory=dict)

    def choose(self, tensor_bytes: int) -> str:
        """The codec for a tensor of that size."""
        size = self._sizes.setdefault(tensor_bytes.bit_length(), _Size())
        size.chosen += 1
        if size.chosen <= TRIALS or len(size.seconds) < 2:
            return RAW if size.chosen % 2 else LOSSLESS
        faster = min(size.seconds, key=size.seconds.__getitem__)
        if size.chosen % RETRY_EVERY:
            return faster
        return LOSSLESS if faster == RAW else RAW

    def note(self, codec: str, tensor_bytes: int, *, pack_s: float, publish_s: float) -> None:
        """A tensor of that size took so long to pack, and its body to publish."""
        size = self._sizes.setdefault(tensor_bytes.bit_length(), _Size())
        took_s = pack_s * (1 + UNPACKING) + publish_s
        mean_s = size.seconds.setdefault(codec, took_s)
        size.seconds[codec] = mean_s + FRESH * (min(took_s, MOST_TIMES * mean_s) - mean_s)
