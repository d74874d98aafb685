"""Sweeps over heads: what each reading at the final position becomes when heads are changed (SPEC section 4)."""

from clifflab.sweep.types import Meter as Meter
from clifflab.sweep.types import Positions as Positions
from clifflab.sweep.types import SweepTrace as SweepTrace
from clifflab.sweep.types import Swept as Swept
