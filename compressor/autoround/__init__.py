"""AutoRound as the backend that quantizes: a plan's widths, with rounding tuned on the user's text. In a subprocess.

::

    from compressor.autoround import Tuning, apply

    receipt, report = apply(plan, source=..., destination="out/", tokens=ids, tuning=Tuning(iters=200))

Needs ``pip install 'moescope[quantize]'`` in the Python that does the work, which may be another one than this.
"""

from compressor.autoround.backend import Report, Tuning, apply

__all__ = ["Report", "Tuning", "apply"]
