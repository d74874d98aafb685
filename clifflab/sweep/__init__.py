"""Sweeps over heads: what each reading at the final position becomes when heads are changed (SPEC section 4)."""

from clifflab.sweep.attribution import attribution as attribution
from clifflab.sweep.direct import DirectEffects as DirectEffects
from clifflab.sweep.direct import direct_effects as direct_effects
from clifflab.sweep.means import mean_outputs as mean_outputs
from clifflab.sweep.resume import sweep as sweep
from clifflab.sweep.types import Meter as Meter
from clifflab.sweep.types import Positions as Positions
from clifflab.sweep.types import SweepTrace as SweepTrace
from clifflab.sweep.types import Swept as Swept
