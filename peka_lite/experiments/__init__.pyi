from ._embed import write_features as write_features
from ._predict_from import predict_from as predict_from
from ._sweep_folder import SweepFolder as SweepFolder, read_sweep_folder as read_sweep_folder
from .config import RunConfig as RunConfig
from .export import export as export
from .features import Features as Features
from .folder import RunFolder as RunFolder
from .model import TrainedModel as TrainedModel, load_trained as load_trained
from .predict import predict_slide as predict_slide, predict_spots as predict_spots
from .run import load_or_run as load_or_run, load_run as load_run, run as run, run_name as run_name, train as train
from .settings import check_field as check_field, describe_settings as describe_settings
from .sweeps._grids import expand as expand, unique_names as unique_names
from .sweeps.points import plan_sweep as plan_sweep, sweep_states as sweep_states
from .sweeps.read import Point as Point, Sweep as Sweep, read_sweep as read_sweep, ready_sweeps as ready_sweeps
from .sweeps.run import run_sweep as run_sweep
