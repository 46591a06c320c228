"""Nonlinear recurrent networks, trained in parallel over the sequence, with the for-loop's result."""

from . import cells, errors
from .cell import Cell, Input, Param, State, cell
from .diagnostics import lyapunov_exponents, verify
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    CellError,
    ConvergenceError,
    GradientError,
    StructureError,
)
from .layers import RNN, ParaGRU, ParaLSTM
from .parallelize import parallelize
from .plan import MultipleShooting, Newton, Sequential
from .scan import ScanInfo, explain, scan
from .tune import tune

__version__ = "0.1.0"
