"""What ``trinorm bench`` does: correctness, then times beside the peers' and the copy's, or predictions with no GPU.

And what ``trinorm profile`` and ``trinorm tune`` do with the same cases.

- ``cases``      what is measured: op, pass, shape, dtype; its inputs and the fewest bytes it can move
- ``providers``  who is measured: trinorm, torch eager, torch.compile, Liger-Kernel, QuACK
- ``timing``     device time by graph replay, host time of an eager call
- ``measure``    one case over all providers, each checked before it is timed
- ``host``       host time of eager calls of functions and modules
- ``records``    what a measurement leaves: one JSON line, with where it comes from
- ``report``     tables; ``plots``  curves
- ``counters``   what Nsight Compute counts in each kernel of a call, and what bounds it
- ``sweep``      every launch worth trying for a case, compiled, checked, timed and ranked
- ``predict``    what the compiler alone tells, with no GPU
- ``changes``    what got slower, or grew, from one file of lines to another; ``changes_report`` shows it
"""
