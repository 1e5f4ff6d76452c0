from .points import plan as plan, sweep_states as sweep_states
from .read import Point as Point, Sweep as Sweep, read_sweep as read_sweep, ready_sweeps as ready_sweeps
from .run import run_sweep as run_sweep
