"""Noise paths, reverse kernels, schedules and trajectories: the denoising chain as a Gaussian policy."""

from diffalign.diffusion.gaussian import Gaussian, standard_normal
from diffalign.diffusion.kernels import CPS, DDIM, DDPM, ODE, DanceSDE, FlowSDE, Kernel, NoisyODE
from diffalign.diffusion.paths import FlowPath, Level, Path, Prediction, VPPath, convert
from diffalign.diffusion.schedules import Schedule, TrainedSteps
from diffalign.diffusion.trajectories import DenoisingTrajectory

__all__ = [
    "CPS", "DDIM", "DDPM", "ODE", "DanceSDE", "DenoisingTrajectory", "FlowPath", "FlowSDE", "Gaussian",
    "Kernel", "Level", "NoisyODE", "Path", "Prediction", "Schedule", "TrainedSteps", "VPPath", "convert",
    "standard_normal",
]
