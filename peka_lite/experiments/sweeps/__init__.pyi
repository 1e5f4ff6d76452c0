from .points import plan_sweep as plan_sweep, sweep_states as sweep_states
from .read import Point as Point, Sweep as Sweep, read_sweep as read_sweep, ready_sweeps as ready_sweeps
from .run import run_sweep as run_sweep
